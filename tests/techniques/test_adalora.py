"""AdaLoRA: its schedule, its ranking against a brute-force one and against peft, in loops that know nothing of it."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import handmade as by_hand
import peft
import pytest
import torch
from handmade import WIDTH
from torch import Tensor, nn

import graftwork as gw
from graftwork.adapters.format import read_card
from graftwork.engine.adapter import Adapter
from graftwork.engine.rank_budget import BudgetSchedule, RankBudget, RankedModule
from graftwork.errors import BadOption
from graftwork.training.states import restore_trained, trained

RANK, TARGET, TOTAL, INITIAL, FINAL = 5, 2, 14, 3, 4
TECHNIQUE = gw.AdaLoRA(
    rank=RANK,
    target_rank=TARGET,
    total_steps=TOTAL,
    initial_steps=INITIAL,
    final_steps=FINAL,
    workspaces=("linear",),
)


def stack(technique: gw.AdaLoRA = TECHNIQUE) -> tuple[nn.Sequential, Adapter]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()
    return model, gw.attach(model, technique)


def modules(adapter: Adapter) -> list[RankedModule]:
    return [module for module in adapter.modules.values() if isinstance(module, RankedModule)]


def budget_of(adapter: Adapter) -> RankBudget:
    return modules(adapter)[0].shared  # type: ignore[return-value]


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """A step as any loop takes it."""
    x = by_hand.values(8, WIDTH, seed=number).double()
    target = by_hand.values(8, 3, seed=99).double()
    optimizer.zero_grad()
    (model(x) - target).square().sum().backward()
    optimizer.step()


def sgd(adapter: Adapter) -> torch.optim.Optimizer:
    return torch.optim.SGD(adapter.parameters(), lr=0.02)


def live(adapter: Adapter) -> int:
    return sum(int((module.values != 0).sum()) for module in modules(adapter))


# --- the checks of the paper's note


def test_check_toy_schedule() -> None:
    schedule = BudgetSchedule(start=48, target=16, total=110, initial=10, final=20, interval=1)
    assert [schedule.budget(step) for step in (1, 10, 30, 50, 70, 90, 110)] == [48, 48, 29, 20, 16, 16, 16]
    assert [step for step in range(1, 111) if schedule.cuts(step)] == list(range(11, 91))


def test_the_last_cut_falls_on_its_step_whatever_the_interval() -> None:
    schedule = BudgetSchedule(start=8, target=2, total=30, initial=3, final=7, interval=4)
    assert [step for step in range(1, 31) if schedule.cuts(step)] == [4, 8, 12, 16, 20, 23]
    assert schedule.budget(23) == 2


def test_the_schedule_is_that_of_peft() -> None:
    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=TARGET, tinit=INITIAL, tfinal=FINAL, total_step=TOTAL, target_modules=["0", "2"]
    )
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), config)
    schedule = BudgetSchedule(
        start=2 * RANK, target=2 * TARGET, total=TOTAL, initial=INITIAL, final=FINAL, interval=1
    )
    theirs = model.base_model.rankallocator
    for step in range(1, TOTAL + 1):
        assert schedule.budget(step) == theirs.budget_schedule(step)[0]


def test_check_definition() -> None:
    module = by_hand.jittered(
        gw.AdaLoRA(total_steps=9, rank=4, alpha=2).build(by_hand.linear("query", 7, WIDTH))
    )
    weight = by_hand.values(7, WIDTH).double()
    expected = weight + 0.5 * module.up @ torch.diag(module.values) @ module.down
    torch.testing.assert_close(module.effective(weight, weight), expected, rtol=1e-12, atol=1e-12)


def test_check_count_and_start() -> None:
    module = gw.AdaLoRA(total_steps=9, rank=4).build(by_hand.linear("query", 700, 900))
    assert by_hand.count([module]) == 4 * (700 + 900 + 1)
    assert not module.values.any()
    for factor in (module.down, module.up):
        assert math.isclose(float(factor.detach().std()), 0.02, rel_tol=0.1)


def test_check_layer_agrees_with_peft() -> None:
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=3, total_step=9, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(WIDTH, 7)).double(), config).double()
    layer = theirs.base_model.model[0]
    alpha = 3 * 4 / (4 + 1e-5)  # HF PEFT divides by the rank and a little
    technique = gw.AdaLoRA(total_steps=9, rank=4, alpha=alpha)
    module = by_hand.jittered(technique.build(by_hand.linear("query", 7, WIDTH)))
    layer.lora_A["default"].data = module.down.data
    layer.lora_B["default"].data = module.up.data
    layer.lora_E["default"].data = module.values.data.unsqueeze(1)
    x, base = by_hand.values(3, WIDTH).double(), layer.base_layer
    expected = nn.functional.linear(x, module.effective(base.weight, base.weight), base.bias)
    torch.testing.assert_close(theirs(x), expected, rtol=1e-6, atol=1e-6)


# --- ranking


def brute_force(gradients: list[list[dict[str, Tensor]]], values: list[list[dict[str, Tensor]]]) -> list[set]:
    """Which triplets (module, k) stay after each step, computed scalar by scalar."""
    smooth: dict[tuple, float] = {}
    unsure: dict[tuple, float] = {}
    schedule = BudgetSchedule(
        start=3 * RANK, target=3 * TARGET, total=TOTAL, initial=INITIAL, final=FINAL, interval=1
    )
    stay, out = {(m, k) for m in range(3) for k in range(RANK)}, []
    for step, (grads, tensors) in enumerate(zip(gradients, values, strict=True), start=1):
        if step <= TOTAL - FINAL:
            for m in range(3):
                for name in ("down", "up", "values"):
                    flat = zip(tensors[m][name].flatten(), grads[m][name].flatten(), strict=True)
                    for i, (w, g) in enumerate(flat):
                        key = (m, name, i)
                        now = abs(float(w) * float(g))
                        smooth[key] = 0.85 * smooth.get(key, 0.0) + 0.15 * now
                        unsure[key] = 0.85 * unsure.get(key, 0.0) + 0.15 * abs(now - smooth[key])
        if INITIAL < step <= TOTAL - FINAL:
            scores = {}
            for m in range(3):
                wide, tall = tensors[m]["down"].shape[1], tensors[m]["up"].shape[0]
                for k in range(RANK):
                    row = [(m, "down", k * wide + j) for j in range(wide)]
                    column = [(m, "up", j * RANK + k) for j in range(tall)]
                    scores[m, k] = smooth[m, "values", k] * unsure[m, "values", k]
                    for part in (row, column):
                        scores[m, k] += sum(smooth[key] * unsure[key] for key in part) / len(part)
            stay = set(sorted(scores, key=lambda key: -scores[key])[: schedule.budget(step)])
        out.append(stay)
    return out


def test_cuts_are_those_of_a_brute_force_ranking() -> None:
    model, adapter = stack()
    parts, optimizer = modules(adapter), sgd(adapter)
    gradients, values, found = [], [], []

    def watch(*_: object) -> None:
        named = [dict(part.named_parameters()) for part in parts]
        own = [{n: t for n, t in tensors.items() if not n.startswith("shared")} for tensors in named]
        gradients.append([{n: t.grad.clone() for n, t in tensors.items()} for tensors in own])
        values.append([{n: t.detach().clone() for n, t in tensors.items()} for tensors in own])

    optimizer.register_step_pre_hook(watch)
    for number in range(TOTAL):
        one_step(model, optimizer, number)
        nonzero = {(m, k) for m, part in enumerate(parts) for k in range(RANK) if part.values[k] != 0}
        found.append(nonzero if number >= INITIAL else None)
    for step, (mine, wanted) in enumerate(zip(found, brute_force(gradients, values), strict=True), start=1):
        assert mine is None or mine == wanted, step
    assert live(adapter) == 3 * TARGET
    assert (
        len({len({k for m, k in found[-1] if m == number}) for number in range(3)}) > 1
    )  # unevenly shared out


def test_ranking_is_that_of_peft() -> None:
    """But at the last cut, where HF PEFT ranks without that step's gradient."""
    config = peft.AdaLoraConfig(
        init_r=RANK,
        target_r=TARGET,
        tinit=INITIAL,
        tfinal=FINAL,
        total_step=TOTAL,
        target_modules=["0", "2", "4"],
    )
    bare = nn.Sequential(
        nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()
    theirs = peft.get_peft_model(bare, config).double()
    layers = [theirs.base_model.model[i] for i in (0, 2, 4)]
    allocator = theirs.base_model.rankallocator
    _, adapter = stack()
    own, budget = modules(adapter), budget_of(adapter)
    for step in range(1, TOTAL - FINAL):
        for number, (layer, module) in enumerate(zip(layers, own, strict=True)):
            pairs = ((layer.lora_A, module.down), (layer.lora_B, module.up), (layer.lora_E, module.values))
            for kind, (held, tensor) in enumerate(pairs):
                seed = 100 * step + 10 * number + kind
                tensor.data = by_hand.values(*tensor.shape, seed=seed).double()
                tensor.grad = by_hand.values(*tensor.shape, seed=seed + 5000).double()
                held["default"].data = tensor.data.clone().reshape(held["default"].shape)
                held["default"].grad = tensor.grad.reshape(held["default"].shape)
        budget.before_step()
        with torch.no_grad():
            budget.after_step()
        if budget.schedule.cuts(step):
            _, pattern = allocator.update_and_allocate(theirs.base_model.model, step)
            assert [part.live.tolist() for part in own] == list(pattern.values()), step
        else:
            allocator.update_and_allocate(theirs.base_model.model, step)


# --- inside any loop


def test_the_choice_stays_in_the_final_steps() -> None:
    model, adapter = stack()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    for number in range(TOTAL - FINAL):
        one_step(model, optimizer, number)
    chosen = [part.live.clone() for part in modules(adapter)]
    for number in range(FINAL + 3):
        one_step(model, optimizer, 50 + number)
        assert live(adapter) == 3 * TARGET
        assert all(torch.equal(part.live, was) for part, was in zip(modules(adapter), chosen, strict=True))


def test_only_the_owner_of_its_tensors_counts() -> None:
    model, adapter = stack()
    other_model, other = stack()
    ours, theirs = sgd(adapter), sgd(other)
    one_step(model, ours, 0)
    one_step(other_model, theirs, 0)
    one_step(other_model, theirs, 1)
    assert (int(budget_of(adapter).step), int(budget_of(other).step)) == (1, 2)
    ours.zero_grad()
    ours.step()  # no gradient, no step
    assert int(budget_of(adapter).step) == 1


def test_an_optimiser_for_each_tensor_counts_once() -> None:
    model, adapter = stack()
    optimizers = [torch.optim.SGD([tensor], lr=0.01) for tensor in adapter.parameters()]
    (model(by_hand.values(8, WIDTH).double())).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert int(budget_of(adapter).step) == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_a_budget_of_their_own(how: str) -> None:
    model, adapter = stack()
    one_step(model, sgd(adapter), 0)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    other = gw.adapters(twin)["default"]
    for number in range(TOTAL):
        one_step(twin, sgd(other), number)
    assert int(budget_of(adapter).step) == 1
    assert live(adapter) == 3 * RANK
    assert live(other) == 3 * TARGET


def test_a_resumed_run_goes_on_where_it_was() -> None:
    model, adapter = stack()
    for number in range(6):
        one_step(model, sgd(adapter), number)
    kept = {name: tensor.detach().clone() for name, tensor in trained(model).items()}
    fresh, again = stack()
    restore_trained(fresh, kept, "checkpoint")
    for number in range(6, TOTAL):
        one_step(model, sgd(adapter), number)
        one_step(fresh, sgd(again), number)
    for (name, one), (_, other) in zip(adapter.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_experts_are_ranked_each() -> None:
    technique = gw.AdaLoRA(total_steps=2, rank=4, target_rank=1)
    (module,) = by_hand.build(technique, [by_hand.EXPERTS])
    assert isinstance(module, RankedModule)
    by_hand.jittered(module)
    assert isinstance(module.shared, RankBudget)
    assert module.shared.schedule.start == 3 * 4
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    weight = by_hand.EXPERTS.matrix().double()
    for _ in range(2):
        optimizer.zero_grad()
        module.effective(weight, weight).square().sum().backward()
        optimizer.step()
    assert int((module.values != 0).sum()) == 3


# --- files and errors


def test_a_file_holds_a_lora(tmp_path: Path) -> None:
    model, adapter = stack()
    for number in range(TOTAL):
        one_step(model, sgd(adapter), number)
    x = by_hand.values(4, WIDTH).double()
    wanted = model(x)
    path = gw.save(model, tmp_path)
    assert read_card(path).techniques == (gw.LoRA(rank=RANK, workspaces=("linear",)),)
    fresh, _ = stack()
    gw.detach(fresh)
    gw.load(fresh, path)
    torch.testing.assert_close(fresh(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "total_steps must be given"),
        ({"total_steps": 9, "initial_steps": 5, "final_steps": 4}, "total_steps=9 leaves no step between"),
        ({"total_steps": 9, "rank": 4, "target_rank": 5}, "target_rank=5 is above rank=4"),
    ],
)
def test_what_cannot_be_is_said_on_attaching(options: dict[str, int], text: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(BadOption, match=text):
        gw.attach(model, gw.AdaLoRA(workspaces=("linear",), **options))
    assert type(model[0]) is nn.Linear
