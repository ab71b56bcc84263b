"""L2P and L2L: choice by keys, gradients, and what a pool of LoRAs is equal to."""

from __future__ import annotations

import pytest
import torch
from scenarios import host, image_domains, images, split_images, texts
from torch import nn

import graftwork as gw
from graftwork.continual import AdapterPool, Learning, PromptPool, run
from graftwork.continual.features import queries
from graftwork.continual.keys import pull, select
from graftwork.continual.pool import Pool
from graftwork.errors import BadOption, RouteError

pytestmark = pytest.mark.slow

LORA = gw.LoRA(rank=2, alpha=2)
SIZES = {"members": 4, "chosen": 2}


def prompts(family: str = "vit-base", **options) -> PromptPool:
    return PromptPool(host(family), 4, length=3, **{**SIZES, **options})


def loras(family: str = "vit-base", technique=LORA, **options) -> AdapterPool:
    return AdapterPool(host(family), technique, 4, **{**SIZES, **options})


POOLS = {"L2P": prompts, "L2L": loras}


def begun(method: Pool, train=None, classes=(0, 1)) -> Pool:
    torch.manual_seed(0)
    method.begin(0, classes, train or images())
    return method


def jitter(method: Pool) -> None:
    torch.manual_seed(3)
    for adapter in gw.adapters(method.model).values():
        for parameter in adapter.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))


def per_member(method: Pool, gradients: bool) -> list[torch.Tensor]:
    """The values, or gradients, of each member as one vector."""
    if isinstance(method, PromptPool):
        prompt = next(gw.adapters(method.model)["prompts"].parameters())
        return list((prompt.grad if gradients else prompt).flatten(1))
    return [
        torch.cat([(p.grad if gradients else p).flatten() for p in adapter.parameters()])
        for adapter in gw.adapters(method.model).values()
    ]


@pytest.mark.parametrize("name", POOLS)
def test_check_2_keys_have_the_pull_alone_and_members_the_task_alone(name):
    train = images().of_classes((0, 1))
    numbers = torch.arange(len(train))
    without = begun(POOLS[name](pull=0.0), train)
    jitter(without)
    without.loss(train, numbers).backward()
    assert without.keys.grad is None or not without.keys.grad.any()
    by_task = per_member(without, gradients=True)
    used = set(select(queries(without.model, train, "first"), without.keys, 2).flatten().tolist())
    assert 0 < len(used) < 4
    for member, gradient in enumerate(by_task):
        assert bool(gradient.any()) == (member in used)

    drawn = begun(POOLS[name](pull=0.7), train)
    jitter(drawn)
    drawn.loss(train, numbers).backward()
    for one, other in zip(per_member(drawn, gradients=True), by_task):
        torch.testing.assert_close(one, other)
    keys = drawn.keys.detach().clone().requires_grad_()
    found = queries(drawn.model, train, "first")
    (-0.7 * pull(found, keys, select(found, keys, 2))).backward()
    torch.testing.assert_close(drawn.keys.grad, keys.grad)
    assert {n for n, row in enumerate(drawn.keys.grad) if row.any()} == used


def test_check_4_l2l_at_init_gives_the_frozen_features():
    method, batch = begun(loras()), images(each=2)
    plain = queries(method.model, batch, "first")
    with torch.no_grad():
        torch.testing.assert_close(
            method._chosen_features(batch, method.choice_of(batch)), plain, atol=1e-6, rtol=1e-6
        )


def test_check_4_n_experts_equal_one_lora_of_n_times_the_rank():
    method, batch = begun(loras()), images(each=2)
    jitter(method)
    chosen = torch.tensor([[2, 0]] * len(batch))
    with torch.no_grad():
        found = method._chosen_features(batch, chosen)
    model = host()
    stacked = gw.attach(model, gw.LoRA(rank=4, alpha=4), name="stacked", head=False)
    parts = [gw.adapters(method.model)[f"member-{m}"].modules for m in (2, 0)]
    for key, module in stacked.modules.items():
        module.down.data = torch.cat([one[key].down for one in parts], 0)
        module.up.data = torch.cat([one[key].up for one in parts], 1)
    with torch.no_grad():
        expected = model(**batch.inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("family", ["vit-base", "bert-base"])
def test_check_5_a_row_does_not_depend_on_the_others(name, family):
    batch = images(each=4) if family == "vit-base" else texts()
    method = begun(POOLS[name](family), batch)
    jitter(method)
    choice = method.choice_of(batch)
    assert len(choice.unique(dim=0)) > 1
    with torch.no_grad():
        together = method._chosen_features(batch, choice)
        for row in range(len(batch)):
            alone = method._chosen_features(batch.take(torch.tensor([row])), choice[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
        order = torch.randperm(len(batch))
        assert torch.equal(method.predict(batch.take(order)), method.predict(batch)[order])


def test_batch_mode_depends_on_the_batch():
    method, batch = begun(loras(mode="batch")), images()
    assert len(method.choice_of(batch).unique(dim=0)) == 1
    alone = torch.cat([method.choice_of(part) for part in batch.batches(1)])
    assert not torch.equal(alone, method.choice_of(batch))


@pytest.mark.parametrize("family", ["vit-base", "bert-base"])
def test_the_head_reads_the_mean_of_the_prompts_outputs(family):
    batch = images(each=2) if family == "vit-base" else texts(each=2)
    method = begun(prompts(family), batch)
    chosen = torch.tensor([[3, 1]]).expand(len(batch), -1)
    prompt = gw.adapters(method.model)["prompts"].placed[0].graft.module.prompts
    plain = host(family)
    by_hand = gw.attach(plain, gw.PromptTuning(length=6), head=False)
    next(by_hand.parameters()).data = prompt[[3, 1]].flatten(0, 1).detach().clone()
    by_hand.placed[0].graft.module.stays = True
    with torch.no_grad():
        expected = plain(**batch.inputs).last_hidden_state[:, 1:7].mean(1)  # behind CLS
        torch.testing.assert_close(method._chosen_features(batch, chosen), expected, atol=1e-5, rtol=1e-5)
        method.read_prompts = method._module(gw.adapters(method.model)["prompts"]).stays = False
        by_hand.placed[0].graft.module.stays = False
        cls = plain(**batch.inputs).last_hidden_state[:, 0]
        torch.testing.assert_close(method._chosen_features(batch, chosen), cls, atol=1e-5, rtol=1e-5)


def test_check_8_counts_of_l2p():
    pool = torch.empty(10, 5, 768)
    assert pool.numel() + torch.empty(10, 768).numel() == 46080
    method = begun(PromptPool(host(), 4, length=5, members=10, chosen=5))
    assert sum(p.numel() for p in method.parameters()) == 10 * 5 * 32 + 10 * 32 + 4 * 33


@pytest.mark.parametrize("name", POOLS)
def test_check_9_head_rows_of_old_classes_do_not_move(name):
    method, scenario = POOLS[name](), split_images()
    learning = Learning(epochs=1, batch_size=8, learning_rate=1e-2)
    learning.learn(method, 0, (0, 1), scenario.tasks[0].train)
    before = method.head.weight[:2].clone()
    learning.learn(method, 1, (2, 3), scenario.tasks[1].train)
    assert torch.equal(method.head.weight[:2], before)
    method.begin(1, (2, 3), scenario.tasks[1].train)
    method.loss(scenario.tasks[1].train, torch.arange(24)).backward()
    assert not method.head.weight.grad[:2].any()
    assert method.head.weight.grad[2:].any()


@pytest.mark.parametrize("name", POOLS)
def test_check_10_nothing_of_a_task_stays_but_pool_keys_and_head(name):
    method = POOLS[name]()
    run(split_images(), method, Learning(epochs=1, batch_size=8))
    assert sum(t.numel() for t in method.state(1).values()) == sum(p.numel() for p in method.parameters())
    held = [value for value in vars(method).values() if isinstance(value, torch.Tensor)]
    assert all(isinstance(value, nn.Parameter) for value in held)


@pytest.mark.parametrize("name", POOLS)
def test_members_can_belong_to_tasks(name):
    method, scenario = POOLS[name](own_members=True), split_images()
    learning = Learning(epochs=1, batch_size=8, learning_rate=1e-2, optimizer="sgd")
    learning.learn(method, 0, (0, 1), scenario.tasks[0].train)
    before = [values.detach().clone() for values in per_member(method, gradients=False)]
    learning.learn(method, 1, (2, 3), scenario.tasks[1].train)
    moved = [not torch.equal(a, b) for a, b in zip(before, per_member(method, gradients=False))]
    assert moved == [False, False, True, True]
    with pytest.raises(BadOption, match="more members"):
        method.begin(2, (0, 1), scenario.tasks[0].train)


@pytest.mark.parametrize("name", POOLS)
def test_a_run_that_was_cut_off_goes_on(name, tmp_path):
    scenario, learning = split_images(), Learning(epochs=1, batch_size=8)
    whole = run(scenario, POOLS[name](), learning, tmp_path)
    (tmp_path / "task-01.safetensors").unlink()
    again = POOLS[name]()
    assert run(scenario, again, learning, tmp_path) == whole


@pytest.mark.parametrize("name", POOLS)
def test_learns_classes_given_at_once_and_the_first_of_domains(name):
    learning = Learning(epochs=10, batch_size=8, learning_rate=1e-2)
    assert run(split_images().joined(), POOLS[name](), learning).average_accuracy > 0.8
    assert run(image_domains(), POOLS[name](), learning).accuracies[0][0] > 0.9


def test_other_techniques_form_pools_where_their_effects_add():
    method = begun(loras(technique=gw.IA3()))
    jitter(method)
    assert method.predict(images(each=2)).shape == (8,)
    with pytest.raises(RouteError, match="cannot be blended"):
        begun(loras(technique=gw.PromptTuning(length=2))).predict(images(each=2))


def test_bad_options_are_named():
    with pytest.raises(BadOption, match="chosen=5 of members=4"):
        loras(chosen=5)
    with pytest.raises(BadOption, match="pull=-1"):
        loras(pull=-1)
    with pytest.raises(BadOption, match="neither 'instance' nor 'batch'"):
        loras(mode="sample")
    with pytest.raises(BadOption, match="no key_init is called"):
        loras(key_init="normal")
