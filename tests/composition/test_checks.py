"""The ten checks of the note on arithmetic composition (Zhang et al. 2023, arXiv:2306.14870), with its numbers."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from stored_adapters import ia3, lora, total, update
from torch import Tensor, nn

from graftwork.composition.methods import Concatenation
from graftwork.composition.operands import Operand, Term
from graftwork.composition.parameters import Parameters
from graftwork.composition.verbs import composed
from graftwork.errors import NotComposable, UnknownName

ONE = lora([[1, 2]], [[3], [4]])
TWO = lora([[-1, 1]], [[2], [0]])
D1 = torch.tensor([[3.0, 6.0], [4.0, 8.0]], dtype=torch.float64)
D2 = torch.tensor([[-2.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
DOWN = Parameters(through="down")


def equal(found: Tensor, wanted: object) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-12, rtol=0)


def test_check_1_addition_is_factor_by_factor() -> None:
    half = total((0.5, ONE), (0.5, TWO))
    equal(half["down"], [[0, 1.5]])
    equal(half["up"], [[2.5], [2]])
    equal(update(half), [[0, 3.75], [0, 3]])
    equal(update(total((0.5, ONE), (0.5, TWO), method=Concatenation())), [[0.5, 4], [2, 4]])


def test_check_1_the_other_library_weights_by_roots() -> None:
    """HF PEFT's "linear" multiplies both factors by the root of the weight: another operator, twice ours here."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    options = {"r": 1, "lora_alpha": 1, "target_modules": ["0"]}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**options), adapter_name="one")
    theirs.add_adapter("two", peft.LoraConfig(**options))
    layer = theirs.base_model.model[0]
    for name, adapter in (("one", ONE), ("two", TWO)):
        tensors = {owner.name: tensor.float() for owner, tensor in adapter.owned().items()}
        layer.lora_A[name].weight.data.copy_(tensors["down"])
        layer.lora_B[name].weight.data.copy_(tensors["up"])
    theirs.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix", combination_type="linear")
    found = layer.get_delta_weight("mix").double()
    torch.testing.assert_close(
        found, torch.tensor([[0, 7.5], [0, 6]], dtype=torch.float64), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(found, 2 * update(total((0.5, ONE), (0.5, TWO))), atol=1e-5, rtol=0)


def test_check_2_negation_goes_through_one_factor() -> None:
    through_up, through_down = total((-1, ONE)), total((-1, ONE), method=DOWN)
    equal(through_up["down"], [[1, 2]])
    equal(through_up["up"], [[-3], [-4]])
    equal(through_down["down"], [[-1, -2]])
    equal(through_down["up"], [[3], [4]])
    equal(update(through_up), [[-3, -6], [-4, -8]])
    equal(update(through_down), [[-3, -6], [-4, -8]])
    both = (-through_up["up"]) @ (-through_up["down"])
    assert torch.equal(both, -D1)  # negating both of a negated pair changes nothing: it is not what we do
    with pytest.raises(UnknownName, match="can carry the sign"):
        total((-1, ONE), method=Parameters(through="both"))


def test_check_2_twice_negated_is_the_operand() -> None:
    negative, _ = composed([Term(-1, Operand("a", ONE))], "n")
    again = total((-1, negative))
    assert all(torch.equal(again[owner.name], tensor) for owner, tensor in ONE.owned().items())


def test_check_3_unlearning_scales_one_factor() -> None:
    found = update(total((-0.3, ONE)))
    equal(found, [[-0.9, -1.8], [-1.2, -2.4]])
    assert not torch.allclose(found, -0.09 * D1)


@pytest.mark.parametrize("method", [Parameters(), DOWN], ids=["up", "down"])
def test_check_4_an_adapter_less_itself_is_zero(method: Parameters) -> None:
    assert not update(total((1, ONE), (-1, ONE), method=method)).any()
    negative, _ = composed([Term(-1, Operand("a", ONE))], "n", method)
    assert not update(total((1, ONE), (1, negative), method=method)).any()


def test_check_5_negated_ia3_is_two_minus_l() -> None:
    h = torch.tensor([2.0, 4.0, -1.0], dtype=torch.float64)
    operand = ia3([1.5, 0.5, 1])
    negative = total((-1, operand))["scale"]
    equal(negative, [0.5, 1.5, 1])
    outputs = torch.stack([operand.tensors["0/attention.query.scale"] * h, negative * h])
    equal(outputs[0], [3, 2, -1])
    equal(outputs[1], [1, 6, -1])
    equal(outputs.mean(0), h.tolist())
    equal(total((-0.6, operand))["scale"], [0.7, 1.3, 1])
    equal(total((0.0, operand))["scale"], [1, 1, 1])


def test_check_6_ia3_mixes_by_means() -> None:
    equal(total((0.5, ia3([1.5, 0.5, 1])), (0.5, ia3([1, 2, 0.8])))["scale"], [1.25, 1.25, 0.9])


def test_check_7_analogy_of_ia3() -> None:
    classifier, target, source = ia3([1.2, 0.9, 1]), ia3([1.1, 1.3, 0.7]), ia3([1, 1.2, 0.9])
    equal(total((0.8, classifier), (0.2, target), (-0.2, source))["scale"], [1.18, 0.94, 0.96])


def test_check_8_analogy_of_lora() -> None:
    classifier, target = lora([[1, 0]], [[1], [2]]), lora([[0, 1]], [[1], [0]])
    source = lora([[1, 1]], [[0], [1]])
    found = total((0.8, classifier), (0.2, target), (-0.2, source))
    equal(found["down"], [[1, 0.4]])
    equal(found["up"], [[1], [1.4]])
    equal(update(found), [[1, 0.4], [1.4, 0.56]])


def test_check_9_detoxifying_an_instructed_adapter() -> None:
    """`a + 0.3*(a - t)` with the sign on A; not neutral where both are equal: (1 + 2 w) B A."""
    toxic = lora([[1.5, 1.5]], [[3], [5]])
    found = total((1, ONE), (0.3, ONE), (-0.3, toxic), method=DOWN)
    equal(found["down"], [[0.85, 2.15]])
    equal(found["up"], [[4.8], [6.7]])
    same = total((1, ONE), (0.3, ONE), (-0.3, ONE), method=DOWN)
    torch.testing.assert_close(update(same), 1.6 * D1)


def test_check_10_weights_of_one_and_zero_give_the_operands() -> None:
    first, second = ia3([1.1, 0.3, 1e-9]), ia3([0.7, 1.9, 1])
    for one, two in ((ONE, TWO), (first, second)):
        for weights, wanted in (((1, 0), one), ((0, 1), two)):
            found = total((weights[0], one), (weights[1], two))
            assert all(torch.equal(found[owner.name], tensor) for owner, tensor in wanted.owned().items())


def test_check_10_operands_are_never_modified() -> None:
    before = [{name: tensor.clone() for name, tensor in one.tensors.items()} for one in (ONE, TWO)]
    for method in (Parameters(), Concatenation()):
        result = total((0.3, ONE), (-2.0, TWO), method=method)
        for tensor in result.values():
            tensor.fill_(math.pi)
    for one, kept in zip((ONE, TWO), before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in one.tensors.items())


def test_check_10_mismatched_rank_or_targets_is_an_error() -> None:
    from stored_adapters import stored

    from graftwork.techniques.lora import LoRA

    wide = lora([[1, 2], [0, 1]], [[3, 1], [4, 1]])
    with pytest.raises(NotComposable, match="rank is 1 and 2"):
        total((1, ONE), (1, wide))
    tensors = {owner.name: tensor for owner, tensor in ONE.owned().items()}
    elsewhere = stored(LoRA(rank=1), tensors, key="1/attention.value")
    for method in (Parameters(), Concatenation()):
        with pytest.raises(
            NotComposable, match=r"only 'x0' has 0/attention.query; only 'x1' has 1/attention.value"
        ):
            total((1, ONE), (1, elsewhere), method=method)
    with pytest.raises(NotComposable, match=r"scale is 1.0 and 2.0"):
        total((1, ONE), (1, lora([[1, 2]], [[3], [4]], alpha=2.0)))
