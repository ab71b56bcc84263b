"""Merging of updates: against brute force in float64 and against HF PEFT where the definition is the same."""

from __future__ import annotations

from itertools import product

import peft
import pytest
import torch
from peft.utils import merge_utils
from stored_adapters import lora, total, update
from torch import Generator, Tensor, nn

import graftwork as gw
from graftwork.adapters.stored import StoredAdapter
from graftwork.composition import (
    DARE,
    TIES,
    Concatenation,
    Linear,
    MagnitudePruning,
    Method,
    make_method,
    merging,
)
from graftwork.composition.operands import Operand, Term
from graftwork.composition.updates import Update, cut
from graftwork.composition.verbs import composed
from graftwork.errors import BadOption, NotComposable, UnknownName
from graftwork.laws import stir
from graftwork.testing import tiny

OUT, IN = 6, 5


def random_lora(rank: int, seed: int, **options: float) -> StoredAdapter:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator)
    return lora(down.tolist(), up.tolist(), **options)


def dense(adapter: StoredAdapter) -> Tensor:
    tensors = {owner.name: tensor for owner, tensor in adapter.owned().items()}
    return adapter.manifest.techniques[0].scale * update(tensors)


A, B, C = random_lora(2, 0), random_lora(3, 1, alpha=6.0), random_lora(1, 2, alpha=0.5)
TERMS = ((1.0, A), (0.5, B), (-0.7, C))
CHANGES = torch.stack([dense(adapter) for _, adapter in TERMS])
WEIGHTS = torch.tensor([weight for weight, _ in TERMS], dtype=torch.float64)
SUM = sum(weight * dense(adapter) for weight, adapter in TERMS)


def test_concatenation_is_exact_and_ranks_add_up() -> None:
    found = total(*TERMS, method=Concatenation())
    assert found["down"].shape == (2 + 3 + 1, IN)
    torch.testing.assert_close(update(found).double(), SUM, atol=1e-5, rtol=0)


def test_linear_of_full_rank_is_the_sum() -> None:
    torch.testing.assert_close(update(total(*TERMS, method=Linear(rank=5))).double(), SUM, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_cut_is_the_nearest_of_its_rank_and_says_what_it_kept(rank: int) -> None:
    given = [Term(weight, Operand(str(i), adapter)) for i, (weight, adapter) in enumerate(TERMS)]
    made, energies = composed(given, "sum", Linear(rank=rank))
    tensors = {owner.name: tensor for owner, tensor in made.owned().items()}
    u, s, v = torch.linalg.svd(SUM)
    wanted = (u[:, :rank] * s[:rank]) @ v[:rank]
    torch.testing.assert_close(update(tensors).double(), wanted, atol=1e-5, rtol=0)
    (energy,) = energies.values()
    assert energy.share == pytest.approx(float((wanted**2).sum() / (SUM**2).sum()))
    torch.testing.assert_close(
        tensors["up"].square().sum(0), tensors["down"].square().sum(1), atol=1e-4, rtol=0
    )


def test_a_cut_above_the_rank_adds_zeros() -> None:
    thin = Update(torch.ones(1, IN, dtype=torch.float64), torch.ones(OUT, 1, dtype=torch.float64))
    found, energy = cut(thin, 4)
    assert found.down.shape == (4, IN)
    torch.testing.assert_close(found.dense(), thin.dense())
    assert energy.share == 1.0
    assert cut(thin.times(0.0), 1)[1].share == 1.0


def test_a_cut_of_stacked_matrices_is_a_cut_of_each() -> None:
    torch.manual_seed(0)
    stack = Update(torch.randn(3, 2, IN, dtype=torch.float64), torch.randn(3, OUT, 2, dtype=torch.float64))
    found, energy = cut(stack, 1)
    alone = [cut(Update(d, u), 1) for d, u in zip(stack.down, stack.up, strict=True)]
    torch.testing.assert_close(found.dense(), torch.stack([one.dense() for one, _ in alone]))
    assert energy.kept == pytest.approx(sum(e.kept for _, e in alone))


def brute_ties(changes: Tensor, weights: Tensor, density: float) -> Tensor:
    """Value by value, in plain Python."""
    kept = []
    for change in changes:
        order = sorted(change.flatten().abs().tolist(), reverse=True)
        least = order[int(density * change.numel()) - 1]
        kept.append([[v if abs(v) >= least else 0.0 for v in row] for row in change.tolist()])
    out = torch.zeros(OUT, IN, dtype=torch.float64)
    for i, j in product(range(OUT), range(IN)):
        values = [float(w) * change[i][j] for w, change in zip(weights, kept, strict=True)]
        sign = 1 if sum(values) >= 0 else -1
        agree = [value for value in values if value * sign > 0]
        out[i, j] = sum(agree) / len(agree) if agree else 0.0
    return out


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_trim_elect_and_average(density: float) -> None:
    wanted = brute_ties(CHANGES, WEIGHTS, density)
    torch.testing.assert_close(merging.ties(CHANGES, WEIGHTS, density), wanted)
    found = update(total(*TERMS, method=TIES(density=density, rank=5))).double()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_ties_votes_with_what_is_subtracted() -> None:
    """Of +1 and -(+3) the election gives minus; HF PEFT elects before weights and keeps nothing of the second."""
    changes, weights = torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([1.0, -1.0])
    assert float(merging.ties(changes, weights, 1.0)) == -3.0


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_rules_agree_with_the_other_library(density: float) -> None:
    """The same functions of the same changes where the definitions are: TIES with equal weights, the rest with any."""
    parts, equal = list(CHANGES), torch.ones(3, dtype=torch.float64)

    def seeded() -> Generator:
        torch.manual_seed(7)
        return Generator().manual_seed(7)

    close = torch.testing.assert_close
    close(merging.linear(CHANGES, WEIGHTS), merge_utils.task_arithmetic(parts, WEIGHTS))
    close(
        merging.magnitude_pruned(CHANGES, WEIGHTS, density),
        merge_utils.magnitude_prune(parts, WEIGHTS, density),
    )
    close(merging.ties(CHANGES, equal, density), merge_utils.ties(parts, equal, density))
    close(merging.dare(CHANGES, WEIGHTS, density, seeded()), merge_utils.dare_linear(parts, WEIGHTS, density))
    close(merging.dare_ties(CHANGES, equal, density, seeded()), merge_utils.dare_ties(parts, equal, density))


THEIRS: dict[str, tuple[Method, dict[str, float]]] = {
    "cat": (Concatenation(), {}),
    "svd": (Linear(rank=3), {"svd_rank": 3}),
    "ties_svd": (TIES(rank=3, density=0.4), {"svd_rank": 3, "density": 0.4}),
    "magnitude_prune_svd": (MagnitudePruning(rank=3, density=0.4), {"svd_rank": 3, "density": 0.4}),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_whole_adapters_agree_with_the_other_library(kind: str) -> None:
    method, options = THEIRS[kind]
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    for number, adapter in enumerate((A, B)):
        technique = adapter.manifest.techniques[0]
        assert isinstance(technique, gw.LoRA)
        rank = technique.rank
        config = peft.LoraConfig(r=rank, lora_alpha=technique.scale * rank, target_modules=["0"])
        if number == 0:
            theirs = peft.get_peft_model(model, config, adapter_name="x0")
        else:
            theirs.add_adapter(f"x{number}", config)
        layer = theirs.base_model.model[0]
        tensors = {owner.name: tensor.float() for owner, tensor in adapter.owned().items()}
        layer.lora_A[f"x{number}"].weight.data.copy_(tensors["down"])
        layer.lora_B[f"x{number}"].weight.data.copy_(tensors["up"])
    theirs.add_weighted_adapter(["x0", "x1"], [1.0, 1.0], "mix", combination_type=kind, **options)
    found = update(total((1.0, A), (1.0, B), method=method))
    torch.testing.assert_close(found, layer.get_delta_weight("mix").detach(), atol=1e-4, rtol=0)


def test_dare_drops_and_rescales_by_its_seed() -> None:
    wide = torch.ones(1, 400, 400, dtype=torch.float64)
    found = merging.dropped(wide, 0.25, Generator().manual_seed(0))
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1.0, abs=0.02)
    same = [update(total(*TERMS, method=DARE(density=0.5, seed=seed, rank=5))) for seed in (0, 0, 1)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_density_one_is_the_plain_sum() -> None:
    for method in (DARE(density=1.0, rank=5), MagnitudePruning(density=1.0, rank=5)):
        torch.testing.assert_close(update(total(*TERMS, method=method)).double(), SUM, atol=1e-5, rtol=0)


def test_what_an_initialiser_took_is_part_of_the_update() -> None:
    """PiSSA's update is B A - B0 A0: a rank-2 R update, which `parameters` refuses and concatenation holds."""
    model = tiny("bert")
    adapter = gw.attach(model, gw.LoRA(rank=2, init="pissa"), name="a", head=False)
    with pytest.raises(NotComposable, match=r"lora .* less what its start took"):
        gw.scale(model, "a", 0.5, name="halved")
    stir(adapter)
    made = gw.scale(model, "a", 0.5, name="halved", method=Concatenation()).adapter
    assert made is not None
    module, half = (one.modules[0, "0/attention.query"] for one in (adapter, made))
    torch.testing.assert_close(half.delta(), 0.5 * module.delta(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "technique",
    [gw.DoRA(rank=2), gw.KaSA(rank=2), gw.VeRA(rank=4), gw.OFT(block=4), gw.LoKr(rank=2), gw.MiSS(rank=4)],
    ids=lambda t: t.name,
)
def test_attached_adapters_of_other_weight_techniques_merge_with_loras(technique: gw.Technique) -> None:
    """The update of any weight technique is f(W) - W."""
    model = tiny("bert")
    one = gw.attach(model, technique, name="one", head=False)
    two = gw.attach(model, gw.LoRA(rank=3), name="two", head=False)
    stir(one)
    stir(two, seed=2)
    made = gw.combine(model, {"one": 0.5, "two": -1.0}, name="sum", method=Linear(rank=32)).adapter
    assert made is not None
    for key in one.sites:
        weight = model.get_submodule(one.sites[key].module)._parameters["weight"].detach()
        changes = [adapter.modules[0, key].effective(weight, weight) - weight for adapter in (one, two, made)]
        torch.testing.assert_close(changes[2], 0.5 * changes[0] - changes[1], atol=1e-5, rtol=1e-4)


def test_what_changes_no_weight_is_refused() -> None:
    model = tiny("bert")
    for technique, reason in ((gw.IA3(), "changes signals"), (gw.BitFit(), "changes a bias")):
        gw.attach(model, technique, name="a", head=False)
        with pytest.raises(NotComposable, match=reason):
            gw.scale(model, "a", 2.0, name="b", method=Linear())
        gw.detach(model)


def test_options_are_checked() -> None:
    with pytest.raises(BadOption, match="rank=0"):
        Linear(rank=0)
    with pytest.raises(BadOption, match="density"):
        TIES(density=0.0)
    with pytest.raises(UnknownName, match="Did you mean ties"):
        make_method("tie", {})
    with pytest.raises(UnknownName, match="'linear' has no option 'density'"):
        make_method("linear", {"density": 0.5})
    assert make_method("dare-ties", {"seed": 3}) == DARE(seed=3, ties=True)
