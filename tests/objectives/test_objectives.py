"""Objectives on attached models: the teacher, which rows count, what is refused, learning with them."""

from __future__ import annotations

import random
from typing import Annotated

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graftwork as gw
from graftwork.errors import BadOption, StateError, UnknownName
from graftwork.objectives import (
    Consistency,
    Diversity,
    Objectives,
    Orthogonality,
    SpectralConcentration,
    make_objective,
    objectives,
)
from graftwork.objectives.rows import counted_rows, shifts_labels
from graftwork.reference.technique import AtLeast
from graftwork.testing import tiny, tiny_batch

torch.set_num_threads(1)
CONSISTENT = [Consistency(weight=0.5, temperature=2)]


def ready(family: str, *names: str, **options: float) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with adapters off their start, and a batch of which some labels are not counted."""
    torch.manual_seed(0)
    model, batch = tiny(family), dict(tiny_batch(family))
    for name in names or ("default",):
        gw.attach(model, gw.LoRA(rank=2, **options), name=name)
        for parameter in gw.adapters(model)[name].parameters():
            nn.init.normal_(parameter, std=0.3)
    key = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    labels = batch.get("labels", batch[key]).clone()
    labels[:, :2] = -100
    return model, {**{k: v for k, v in batch.items() if k != "decoder_input_ids"}, "labels": labels}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "t5", "bart", "bert-masked"])
def test_consistency_is_the_divergence_from_the_bare_base_at_the_rows_of_the_task_loss(family: str) -> None:
    """Against KL written out in float64, on the rows whose cross-entropy the model's own loss is the mean of."""
    model, batch = ready(family)
    outputs = model(**batch)
    total = Objectives(model, CONSISTENT)(outputs, batch, progress=0)
    with gw.active(model), torch.no_grad():
        taught = model(**batch).logits
    shift = 1 if family in ("llama", "gpt2", "mamba") else 0
    length = outputs.logits.shape[1] - shift
    counts = batch["labels"][:, shift:] != -100
    student, teacher = (x[:, :length][counts].detach().double() / 2 for x in (outputs.logits, taught))
    own = functional.cross_entropy(2 * student, batch["labels"][:, shift:][counts])
    assert own.item() == pytest.approx(outputs.loss.item(), rel=1e-5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    assert total.parts["consistency"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert total.loss.item() == pytest.approx(outputs.loss.item() + 0.5 * expected.item(), rel=1e-5)
    assert total.loss.dtype is torch.float32


def test_rows_are_those_that_predict_a_counted_label() -> None:
    """Prompt 0-1, answer 2-3: its first token is predicted at 1, and 3 predicts nothing that counts."""
    logits = torch.arange(4.0).reshape(1, 4, 1).expand(1, 4, 2)
    labels = torch.tensor([[-100, -100, 5, 6]])
    assert counted_rows(logits, labels, shifted=True)[:, 0].tolist() == [1, 2]
    assert counted_rows(logits, labels, shifted=False)[:, 0].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("family", "shifted"),
    [("llama", True), ("gpt2", True), ("mamba", True), ("t5", False), ("bert-masked", False)],
)
def test_which_models_shift_their_labels(family: str, shifted: bool) -> None:
    assert shifts_labels(tiny(family)) is shifted


def test_the_teacher_leaves_everything_as_it_was() -> None:
    """Active set, each module's mode, random numbers of torch and Python, and dropout between two runs."""
    model, batch = ready("llama", "a", "b", dropout=0.3)
    gw.active(model, "b", "a")
    model.train()
    frozen = next(m for m in model.modules() if type(m).__name__ == "LlamaMLP").eval()
    outputs = model(**batch)
    modes = [m.training for m in model.modules()]
    state, number = torch.get_rng_state(), random.getstate()
    Objectives(model, CONSISTENT)(outputs, batch, progress=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == number
    assert [m.training for m in model.modules()] == modes
    assert not frozen.training
    torch.set_rng_state(state)
    again = model(**batch).logits
    torch.set_rng_state(state)
    gw.active(model, "b", "a")
    assert torch.equal(model(**batch).logits, again)


def test_the_teacher_leaves_everything_as_it_was_when_it_fails() -> None:
    model, batch = ready("llama")
    outputs = model.train()(**batch)
    with pytest.raises(ValueError, match="input_ids"):
        Objectives(model, CONSISTENT)(outputs, {**batch, "input_ids": None}, progress=0)
    assert model.training
    assert not torch.equal(model(**batch).logits, base(model, batch))


def base(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with gw.active(model), torch.no_grad():
        return model(**batch).logits


def test_the_teacher_of_a_routed_batch_is_the_bare_base() -> None:
    model, batch = ready("llama", "a", "b")
    gw.route(model, ["a", "b"], torch.arange(len(batch["input_ids"])) % 2)
    outputs = model(**batch)
    total = Objectives(model, [*CONSISTENT, Orthogonality(weight=0.1)])(outputs, batch, progress=0)
    routed = model(**batch).logits
    assert torch.equal(routed, outputs.logits)
    gw.route(model, None)
    outputs.logits = routed
    gw.active(model, "a")
    assert (
        total.parts["consistency"]
        == Objectives(model, CONSISTENT)(outputs, batch, progress=0).parts["consistency"]
    )


def test_the_teacher_between_a_forward_and_a_backward_that_recomputes() -> None:
    """A checkpoint of the caller's own runs layers again in backward; they must not meet the teacher's choice."""
    gradients = []
    for recompute in (False, True):
        model, batch = ready("llama")
        if recompute:
            layer = model.model.layers[1]
            run = layer.forward
            layer.forward = lambda *a, run=run, **k: torch.utils.checkpoint.checkpoint(
                run, *a, use_reentrant=False, **k
            )
        Objectives(model, CONSISTENT)(
            model.train()(**batch, use_cache=False), batch, progress=0
        ).loss.backward()
        gradients.append([p.grad for p in gw.adapters(model)["default"].parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_terms_are_fp32_under_autocast() -> None:
    model, batch = ready("llama")
    terms = [*CONSISTENT, Diversity(weight=0.1, form="covariance"), Orthogonality(weight=0.1)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch)
        total = Objectives(model, terms)(outputs, batch, progress=0)
        taught = base(model, batch)
    assert {part.dtype for name, part in total.parts.items() if name != "task"} == {torch.float32}
    rows, teacher = (x[:, :-1][batch["labels"][:, 1:] != -100].double() / 2 for x in (outputs.logits, taught))
    p = teacher.softmax(-1)
    expected = 4 * (p * (p / rows.softmax(-1)).log()).sum(-1).mean()
    assert total.parts["consistency"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_two_phase_terms_join_later() -> None:
    model, batch = ready("llama")
    terms = Objectives(model, [Diversity(weight=0.2, schedule="two-phase")])
    outputs = model(**batch)
    assert terms(outputs, batch, progress=0.1).loss is outputs.loss
    late = terms(outputs, batch, progress=0.9)
    assert late.loss.item() == pytest.approx((outputs.loss + 0.2 * late.parts["diversity"]).item())


def test_consistency_keeps_the_model_nearer_to_its_base() -> None:
    """The same steps with and without the term; more weight ends nearer."""
    ends = []
    for weight in (0.0, 1.0, 10.0):
        model, batch = ready("bert-classification")
        labels = torch.arange(len(batch["input_ids"])) % 2
        batch["labels"] = labels
        gw.detach(model)
        gw.attach(model, gw.LoRA(rank=2))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        terms = Objectives(model, [Consistency(weight=weight)])
        for _ in range(15):
            optimizer.zero_grad()
            terms(model(**batch), batch, progress=0).loss.backward()
            optimizer.step()
        probe = Objectives(model, [Consistency(weight=1)])
        ends.append(probe(model(**batch), batch, progress=0).parts["consistency"].item())
    assert ends[0] > ends[1] > ends[2] > 0


def test_a_lean_loss_has_no_logits_and_says_so() -> None:
    model, batch = ready("llama")
    gw.lean(model)
    model.train()
    with pytest.raises(StateError, match=r"gw\.lean\(model, loss=False\)"):
        Objectives(model, [Diversity(weight=1)])(model(**batch), batch, progress=0)
    Objectives(model, [Orthogonality(weight=1)])(model(**batch), batch, progress=0).loss.backward()


def test_what_is_refused() -> None:
    model, batch = ready("bert-classification")
    batch["labels"] = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    outputs = model(**batch)
    terms = Objectives(model, CONSISTENT)
    with pytest.raises(BadOption, match="share of a run"):
        terms(outputs, batch, progress=3)
    with pytest.raises(StateError, match="no loss"):
        terms({"logits": outputs.logits}, batch, progress=0)
    with pytest.raises(StateError, match="no labels"):
        terms(outputs, {"input_ids": batch["input_ids"]}, progress=0)
    with pytest.raises(BadOption, match="do not belong together"):
        terms(outputs, {**batch, "labels": torch.zeros(7, dtype=torch.long)}, progress=0)
    with pytest.raises(BadOption, match="given twice: consistency"):
        Objectives(model, [*CONSISTENT, Consistency(weight=1)])
    with pytest.raises(StateError, match="attach"):
        Objectives(tiny("bert-classification"), CONSISTENT)
    with pytest.raises(BadOption, match="one output"):
        Diversity(weight=1)(
            gw.objectives.Context(
                logits=torch.ones(3, 1),
                labels=torch.ones(3),
                shifted=False,
                teach=lambda: None,
                modules=(),
                progress=0,
            )
        )


def test_names_and_options() -> None:
    assert list(objectives())[:4] == ["consistency", "diversity", "load-balance", "orthogonality"]
    assert make_objective("spectral-concentration", {"weight": 1, "components": 3}) == SpectralConcentration(
        weight=1, components=3
    )
    with pytest.raises(UnknownName, match="consistency"):
        make_objective("consistancy", {"weight": 1})
    with pytest.raises(UnknownName, match="temperature"):
        make_objective("consistency", {"weight": 1, "temprature": 2})
    with pytest.raises(BadOption, match="consistency needs weight"):
        make_objective("consistency")
    with pytest.raises(BadOption, match="weight=-1 must be at least 0"):
        Consistency(weight=-1)
    with pytest.raises(BadOption, match="schedule"):
        Consistency(weight=1, schedule="linear")  # type: ignore[arg-type]


def test_one_of_your_own() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Shrink(gw.objectives.Objective):
        """The squared size of the logits."""

        power: Annotated[int, AtLeast(1)] = 2

        def __call__(self, context: gw.objectives.Context) -> Tensor:
            return context.rows.pow(self.power).mean()

    model, batch = ready("llama")
    total = Objectives(model, [make_objective("shrink", {"weight": 0.1})])(model(**batch), batch, progress=0)
    assert total.parts["shrink"] > 0
