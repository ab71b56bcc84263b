"""S-Prompts and S-LoRA: one adapter per task, whose training touches nothing of other tasks."""

from __future__ import annotations

import pytest
import torch
from scenarios import host, image_domains, images, split_images, texts

import graftwork as gw
from graftwork.continual import Learning, Samples, Scenario, TaskAdapters, accuracy, run
from graftwork.continual.features import features, queries
from graftwork.errors import BadOption, StateError

PROMPT, LORA = gw.PromptTuning(length=3), gw.LoRA(rank=2)
TECHNIQUES = {
    "prompt": PROMPT,
    "lora": LORA,
    "ia3": gw.IA3(),
    "prefix": gw.PrefixTuning(length=2, hidden=None),
}
SHORT = Learning(epochs=2, batch_size=8, learning_rate=5e-3)


def learner(technique=LORA, **options) -> TaskAdapters:
    return TaskAdapters(host(), technique, **{"centres": 3, **options})


def learnt(technique=LORA, scenario: Scenario | None = None) -> TaskAdapters:
    method = learner(technique)
    run(scenario or split_images(), method, SHORT)
    return method


def jitter(method: TaskAdapters) -> None:
    """Adapters that differ visibly."""
    torch.manual_seed(3)
    for adapter in gw.adapters(method.model).values():
        for parameter in adapter.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", TECHNIQUES)
def test_check_3_earlier_tasks_stay_to_the_bit(name):
    method, scenario = learner(TECHNIQUES[name]), split_images(4)
    kept = []
    for number, task in enumerate(scenario.tasks):
        SHORT.learn(method, number, task.classes, task.train)
        for earlier, state in enumerate(kept):
            now = method.state(earlier)
            assert state.keys() == now.keys()
            assert all(torch.equal(state[key], now[key]) for key in state)
        kept.append({key: tensor.clone() for key, tensor in method.state(number).items()})


@pytest.mark.parametrize("name", ["prompt", "lora"])
def test_check_3_no_forgetting_with_an_oracle(name):
    method, scenario = learner(TECHNIQUES[name]), split_images()
    rows = []
    for number, task in enumerate(scenario.tasks):
        SHORT.learn(method, number, task.classes, task.train)
        with torch.no_grad():
            rows.append(
                [
                    method.predict(t.test, torch.full((len(t.test),), i))
                    for i, t in enumerate(scenario.tasks[: number + 1])
                ]
            )
    assert torch.equal(rows[0][0], rows[1][0])


def test_check_4_s_lora_at_init_gives_the_frozen_features():
    model, batch = host(), images(2, each=3)
    plain = queries(model, batch, "first")
    method = TaskAdapters(model, LORA)
    method.begin(0, (0, 1), batch)
    with gw.active(model, "task-0"), torch.no_grad():
        assert torch.equal(features(model, batch.inputs, "first"), plain)


@pytest.mark.parametrize("name", TECHNIQUES)
@pytest.mark.parametrize("family", ["vit-base", "bert-base"])
def test_check_5_a_mixed_batch_equals_looping_over_tasks(name, family):
    batch = images() if family == "vit-base" else texts()
    method = TaskAdapters(host(family), TECHNIQUES[name], centres=2)
    for number, classes in enumerate([(0, 1), (2, 3)]):
        method.begin(number, classes, batch.of_classes(classes))
        method.finish()
    jitter(method)
    torch.manual_seed(1)
    order = torch.randperm(len(batch))
    mixed = batch.take(order)
    tasks = torch.randint(2, (len(mixed),))
    names = ["task-0", "task-1"]
    with torch.no_grad():
        with gw.route(method.model, names, tasks):
            together = features(method.model, mixed.inputs, "first")
        for number, task in enumerate(names):
            rows = (tasks == number).nonzero().squeeze(1)
            with gw.active(method.model, task):
                alone = features(method.model, mixed.take(rows).inputs, "first")
            torch.testing.assert_close(together[rows], alone, atol=1e-5, rtol=1e-5)
        found = method.predict(mixed)
        turned = torch.randperm(len(mixed))
        assert torch.equal(method.predict(mixed.take(turned)), found[turned])


def test_check_6_queries_ignore_what_is_attached():
    method, batch = learnt(), images(each=2)
    jitter(method)
    assert torch.equal(queries(method.model, batch, "first"), queries(host(), batch, "first"))


def test_check_8_counts_of_s_prompts():
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        model = ViTModel(ViTConfig(num_hidden_layers=12, hidden_size=768), add_pooling_layer=False)
    assert gw.attach(model, gw.PromptTuning(length=10), head=False, name="p").count() == 7680
    queries_and_values = gw.LoRA(rank=4, workspaces=["attention.query", "attention.value"])
    assert gw.attach(model, queries_and_values, head=False, name="l").count() == 147456
    method = learnt(PROMPT)
    assert method.centres[0].numel() == 3 * 32
    assert torch.empty(5, 768).numel() == 3840


def test_check_10_a_task_is_given_its_own_data_alone():
    scenario, seen = split_images(), []

    class Watched(TaskAdapters):
        def begin(self, number, classes, train):
            seen.append((number, train.classes))
            super().begin(number, classes, train)

        def loss(self, batch, numbers):
            seen.append((len(self.heads) - 1, batch.classes))
            return super().loss(batch, numbers)

    method = Watched(host(), LORA, centres=2)
    run(scenario, method, SHORT)
    assert all(set(classes) <= set(scenario.tasks[number].classes) for number, classes in seen)
    tensors = method.state(0)
    assert {key.split(".")[0] for key in tensors} == {"adapter", "head", "centres"}
    held = sum(t.numel() for t in tensors.values())
    own = gw.adapters(method.model)["task-0"].count() + 2 * (32 + 1) + 2 * 32
    assert held == own


@pytest.mark.slow
def test_learns_classes_and_domains():
    for scenario in (split_images(), image_domains()):
        for technique in (PROMPT, LORA):
            result = run(scenario, learner(technique), Learning(epochs=6, batch_size=8, learning_rate=1e-2))
            assert result.average_accuracy > 0.9, technique
            assert len(result.accuracies) == 2


def test_dropout_is_at_work_while_learning_and_off_elsewhere():
    method = learner(gw.LoRA(rank=2, dropout=0.5))
    task = split_images().tasks[0]
    seen = []

    class Noticing(TaskAdapters):
        def loss(self, batch, numbers):
            seen.append(self.model.training)
            return super().loss(batch, numbers)

    method.__class__ = Noticing
    SHORT.learn(method, 0, task.classes, task.train)
    assert all(seen)
    assert not method.model.training


def test_bad_calls_say_what_to_do():
    model = host()
    gw.attach(model, LORA)
    with pytest.raises(StateError, match="default is attached"):
        run(split_images(), TaskAdapters(model, LORA), SHORT)
    with pytest.raises(BadOption, match="without a head"):
        run(split_images(), TaskAdapters(host("vit-classification"), LORA), SHORT)
    with pytest.raises(BadOption, match="midle"):
        TaskAdapters(host(), LORA, pooling="midle")
    with pytest.raises(BadOption, match="at least 1"):
        TaskAdapters(host(), LORA, centres=0)


def test_accuracy_counts_right_answers():
    method, scenario = learnt(), split_images()
    test = scenario.tasks[0].test
    with torch.no_grad():
        right = (method.predict(test) == test.labels).float().mean().item()
    assert accuracy(method, test) == pytest.approx(right)
    strangers = Samples(test.inputs, torch.full_like(test.labels, 9))
    assert accuracy(method, strangers) == 0
