"""A run over tasks: scenarios, bounds, and going on after a kill with the same result."""

from __future__ import annotations

import pytest
import torch
from scenarios import host, image_domains, images, split_images, texts

import graftwork as gw
from graftwork.continual import Learning, Samples, Sequential, TaskAdapters, by_classes, by_domains, run
from graftwork.errors import BadData, BadFile, BadOption, StateError

pytestmark = pytest.mark.slow

SHORT = Learning(epochs=1, batch_size=8, learning_rate=5e-3, seed=3)


def make_task_adapters() -> TaskAdapters:
    return TaskAdapters(host(), gw.LoRA(rank=2, dropout=0.1), centres=2)


def make_sequential() -> Sequential:
    return Sequential(host(), gw.LoRA(rank=2), classes=4)


METHODS = {"task adapters": make_task_adapters, "sequential": make_sequential}


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps", [0, 3, 7])
def test_a_killed_run_goes_on_to_the_same_result(name, steps, tmp_path):
    scenario, make = split_images(4), METHODS[name]
    whole_learner = make()
    whole = run(scenario, whole_learner, SHORT, tmp_path / "whole")

    cut = make()
    count, loss = 0, cut.loss

    def dying(batch, numbers):
        nonlocal count
        count += 1
        if count > steps:
            raise Killed
        return loss(batch, numbers)

    cut.loss = dying
    with pytest.raises(Killed):
        run(scenario, cut, SHORT, tmp_path / "cut")
    torch.randn(3)  # the global generator is somewhere else
    again = make()
    assert run(scenario, again, SHORT, tmp_path / "cut") == whole
    for number in range(4):
        one, other = whole_learner.state(number), again.state(number)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_finished_run_is_read_and_not_repeated(tmp_path):
    scenario = split_images()
    first = run(scenario, make_task_adapters(), SHORT, tmp_path)
    method = make_task_adapters()
    method.loss = None  # type: ignore[assignment]
    assert run(scenario, method, SHORT, tmp_path) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["task-00.safetensors", "task-01.safetensors"]


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(split_images(), make_task_adapters(), SHORT, tmp_path)
    with pytest.raises(StateError, match="folder of its own"):
        run(split_images(), TaskAdapters(host(), gw.LoRA(rank=4), centres=2), SHORT, tmp_path)
    with pytest.raises(StateError, match="folder of its own"):
        run(image_domains(), make_task_adapters(), SHORT, tmp_path)
    with pytest.raises(StateError, match="folder of its own"):
        run(split_images(), make_task_adapters(), Learning(epochs=2), tmp_path)


def test_another_base_is_refused_and_another_pooler_is_not(tmp_path):
    first = run(split_images(), make_task_adapters(), SHORT, tmp_path)
    method = make_task_adapters()
    torch.nn.init.normal_(method.model.pooler.dense.weight)  # drawn anew when a bare model is loaded
    assert run(split_images(), method, SHORT, tmp_path) == first
    other = make_task_adapters()
    for parameter in other.model.layers.parameters():
        parameter.data.mul_(1.5)
    with pytest.raises(StateError, match="another base"):
        run(split_images(), other, SHORT, tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    run(split_images(), make_task_adapters(), SHORT, tmp_path)
    file = tmp_path / "task-00.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadFile, match=r"task-00\.safetensors is damaged"):
        run(split_images(), make_task_adapters(), SHORT, tmp_path)


def test_the_result_does_not_depend_on_the_global_generator_and_leaves_it():
    torch.manual_seed(5)
    first = run(split_images(), make_task_adapters(), SHORT)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert run(split_images(), make_task_adapters(), SHORT) == first


def test_joint_training_learns_what_sequential_training_forgets():
    scenario = split_images(4)
    learning = Learning(epochs=6, batch_size=8, learning_rate=1e-2)
    joint = run(scenario.joined(), make_sequential(), learning)
    later = run(scenario, Sequential(host(), gw.LoRA(rank=2), classes=4, mask=False), learning)
    assert joint.average_accuracy > 0.9
    assert later.average_accuracy < 0.7
    assert later.forgetting > 0.3


def test_check_9_masked_training_leaves_other_classes_alone():
    method = make_sequential()
    scenario = split_images()
    SHORT.learn(method, 0, scenario.tasks[0].classes, scenario.tasks[0].train)
    before = {key: tensor.clone() for key, tensor in method.head.state_dict().items()}
    method.begin(1, (2, 3), scenario.tasks[1].train)
    method.loss(scenario.tasks[1].train, torch.arange(24)).backward()
    assert not method.head.weight.grad[:2].any()
    assert method.head.weight.grad[2:].any()
    method.head.weight.grad = None
    SHORT.learn(method, 1, (2, 3), scenario.tasks[1].train)
    after = method.head.state_dict()
    assert torch.equal(after["weight"][:2], before["weight"][:2])
    assert torch.equal(after["bias"][:2], before["bias"][:2])
    assert not torch.equal(after["weight"][2:], before["weight"][2:])


def test_a_fixed_test_set_is_measured_after_each_task():
    held = images(2, each=5, seed=4, shift=1.0)
    domains = {"a": (images(2), images(2, seed=1)), "b": (images(2, shift=2.0), images(2, seed=1, shift=2.0))}
    result = run(by_domains(domains, held_out=held), make_task_adapters(), SHORT)
    assert len(result.held_out) == 2
    assert all(0 <= value <= 1 for value in result.held_out)


def test_scenarios_are_checked():
    train = images()
    with pytest.raises(BadOption, match="evenly among 3 tasks"):
        by_classes(train, train, 3)
    with pytest.raises(BadData, match="share no class"):
        by_classes(train, train, [(0, 1), (1, 2)])
    with pytest.raises(BadData, match="same classes"):
        by_domains({"a": (images(2), images(2)), "b": (images(3), images(3))})
    with pytest.raises(BadData, match=r"test samples of classes \[3\]"):
        by_domains({"a": (images(3), images(4))})
    with pytest.raises(BadData, match="no train samples"):
        by_classes(train, train, [(0, 1), (8, 9)])


def test_samples_are_checked_and_joined():
    one = images(2)
    with pytest.raises(BadData, match="differ in number"):
        Samples(one.inputs, one.labels[:3])
    with pytest.raises(BadData, match="class numbers"):
        Samples(one.inputs, one.labels.float())
    with pytest.raises(BadData, match="cannot be joined"):
        Samples.joined([one, texts(2)])
    both = Samples.joined([one, images(2, seed=1)])
    assert len(both) == 2 * len(one)
    assert both.of_classes([1]).classes == (1,)


def test_padding_that_all_have_is_left_out():
    short = texts()
    wide = {name: torch.nn.functional.pad(values, (0, 5)) for name, values in short.inputs.items()}
    taken = Samples(wide, short.labels).take(torch.arange(4))
    used = int(short.inputs["attention_mask"][:4].sum(1).max())
    assert taken.inputs["input_ids"].shape == (4, used)
    assert torch.equal(taken.inputs["input_ids"], short.inputs["input_ids"][:4, :used])


def test_samples_come_from_encoded_examples():
    from transformers import ViTImageProcessor

    from graftwork.data.rows import Rows
    from graftwork.tasks.image_classification import ImageClassification

    rows = Rows({"image": [[[0, 255], [10, 20]]] * 3, "label": [1, 0, 1]})
    task = ImageClassification().fit(rows)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    found = Samples.of(task.encode(rows, processor), task.collator(processor))
    assert found.inputs["pixel_values"].shape == (3, 3, 16, 16)
    assert found.labels.tolist() == [1, 0, 1]


def test_learning_options_are_checked():
    with pytest.raises(BadOption, match="epochs=0"):
        Learning(epochs=0)
    with pytest.raises(BadOption, match="rmsprop"):
        Learning(optimizer="rmsprop")
