"""Load balance: its formula, which tokens count, what recomputation and slices of a batch leave of it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import graftwork as gw
from graftwork.engine.recompute import enable_checkpointing
from graftwork.errors import NothingMatches, StateError
from graftwork.laws import stir
from graftwork.objectives import Consistency, LoadBalance, Objectives, Orthogonality
from graftwork.objectives.load_balance import imbalance
from graftwork.testing import tiny, tiny_batch

torch.set_num_threads(1)
TERM = [LoadBalance(weight=0.5)]


def ready(family: str = "llama", **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model in training with routers off their start, and a padded batch with labels."""
    torch.manual_seed(0)
    model, batch = tiny(family), dict(tiny_batch(family))
    stir(gw.attach(model, gw.MixtureOfLoRA(experts=3, rank=2, **options), head=False), 0.1)
    key = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    batch["labels"] = batch[key].clone()
    batch["labels"][:, :2] = -100
    return model.train(), {name: each for name, each in batch.items() if name != "decoder_input_ids"}


def by_hand(scores: Tensor, takes: int) -> float:
    """Token by token, expert by expert."""
    experts = scores.shape[1]
    share, mean = [0.0] * experts, [0.0] * experts
    for row in scores.detach().double():
        gates = (row - row.max()).exp()
        gates = gates / gates.sum()
        for expert in sorted(range(experts), key=lambda e: -row[e])[:takes]:
            share[expert] += 1 / takes / len(scores)
        for expert in range(experts):
            mean[expert] += float(gates[expert]) / len(scores)
    return experts * sum(f * p for f, p in zip(share, mean, strict=True))


def read_by(adapter: gw.Adapter) -> dict[str, list[Tensor]]:
    """What each module is given from now on, by the key of its site."""
    found: dict[str, list[Tensor]] = {}
    for (_, key), module in adapter.modules.items():
        module.register_forward_pre_hook(lambda _, args, key=key: found.setdefault(key, []).append(args[0]))
    return found


def expected(adapter: gw.Adapter, rows: dict[str, Tensor], takes: int) -> float:
    """The mean over the routers, given the tokens (M, C) that count at each."""
    each = [
        by_hand(rows[key].detach().double() @ module.router.detach().double().T, takes)
        for (_, key), module in adapter.modules.items()
    ]
    return sum(each) / len(each)


# The formula


@pytest.mark.parametrize(("takes", "chosen"), [(1, 1), (2, 2), (3, 3), (5, 1)])
def test_the_formula_by_hand(takes: int, chosen: int) -> None:
    scores = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert imbalance(scores, takes).item() == pytest.approx(by_hand(scores, chosen), abs=1e-12)


@pytest.mark.parametrize("takes", [1, 2])
def test_mixtrals_is_as_many_times_larger_as_a_token_takes_experts(takes: int) -> None:
    scores = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    theirs = load_balancing_loss_func((scores,), 5, takes)
    torch.testing.assert_close(takes * imbalance(scores, takes), theirs)


def test_one_where_alike_and_the_number_of_experts_where_collapsed() -> None:
    assert imbalance(torch.zeros(12, 4)).item() == 1
    turns = 100 * torch.eye(4, dtype=torch.float64).repeat(3, 1)
    assert imbalance(turns).item() == pytest.approx(1, abs=1e-12)
    collapsed = torch.zeros(12, 4, dtype=torch.float64)
    collapsed[:, 2] = 100
    assert imbalance(collapsed).item() == pytest.approx(4, abs=1e-12)
    assert imbalance(torch.zeros(0, 4)).item() == 0


def test_no_certain_router_is_below_the_uniform_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        certain = 1000 * torch.randn(30, 4, dtype=torch.float64, generator=generator)
        assert imbalance(certain).item() >= 1 - 1e-9


# On a model


@pytest.mark.parametrize(("top_k", "takes"), [(None, 1), (1, 1), (2, 2)])
def test_padding_does_not_count(top_k: int | None, takes: int) -> None:
    model, batch = ready(top_k=top_k)
    adapter = gw.adapters(model)["default"]
    objectives, read = Objectives(model, TERM), read_by(adapter)
    outputs = model(**batch)
    total = objectives(outputs, batch, progress=0)
    real = batch["attention_mask"].bool()
    assert not real.all()
    wanted = expected(adapter, {key: found[0][real] for key, found in read.items()}, takes)
    assert total.parts["load-balance"].item() == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(total.loss, outputs.loss + 0.5 * total.parts["load-balance"])


def test_encoder_and_decoder_count_their_own_tokens() -> None:
    model, batch = ready("t5")
    adapter = gw.adapters(model)["default"]
    objectives, read = Objectives(model, TERM), read_by(adapter)
    total = objectives(model(**batch), batch, progress=0)
    masks = {"encoder": batch["attention_mask"].bool(), "decoder": batch["labels"] != -100}
    rows = {key: found[0][masks[key.split(".")[0]]] for key, found in read.items()}
    assert total.parts["load-balance"].item() == pytest.approx(expected(adapter, rows, 1), rel=1e-5)


@pytest.mark.parametrize("by_token", [False, True])
def test_tokens_of_other_adapters_do_not_count(by_token: bool) -> None:
    model, batch = ready()
    gw.attach(model, gw.LoRA(rank=2), name="other")
    gw.trainable(model, "default", "other")
    adapter, real = gw.adapters(model)["default"], batch["attention_mask"].bool()
    index = torch.tensor([0, 1, 0])
    index = (torch.arange(7) % 2).expand(3, -1) if by_token else index
    objectives, read = Objectives(model, TERM), read_by(adapter)
    with gw.route(model, ["default", "other"], index):
        total = objectives(model(**batch), batch, progress=0)
    mine = real[index == 0]
    rows = {key: found[0][mine if by_token else mine.view(2, 7)] for key, found in read.items()}
    assert total.parts["load-balance"].item() == pytest.approx(expected(adapter, rows, 1), rel=1e-5)


def test_all_tokens_count_where_a_prompt_adds_positions() -> None:
    model, batch = ready()
    gw.attach(model, gw.PromptTuning(length=2), name="prompt")
    gw.active(model, "prompt", "default")
    gw.trainable(model, "default")
    adapter = gw.adapters(model)["default"]
    objectives, read = Objectives(model, TERM), read_by(adapter)
    total = objectives(model(**batch), batch, progress=0)
    rows = {key: found[0].flatten(0, 1) for key, found in read.items()}
    assert {len(found) for found in rows.values()} == {3 * 9}
    assert total.parts["load-balance"].item() == pytest.approx(expected(adapter, rows, 1), rel=1e-5)


def test_its_gradient_spreads_a_collapsed_router() -> None:
    model, batch = ready()
    adapter = gw.adapters(model)["default"]
    objectives, read = Objectives(model, [LoadBalance(weight=1)]), read_by(adapter)
    routers = {key: module.router for (_, key), module in adapter.modules.items()}
    with torch.no_grad():
        for module in adapter.modules.values():
            module.up.zero_()
        model(**batch)
        for key, router in routers.items():  # all tokens like expert 0
            router.copy_(0.1 * torch.randn_like(router))
            router[0] += 3 * torch.linalg.pinv(read[key][0].flatten(0, 1)).sum(1)
    optimizer = torch.optim.Adam(routers.values(), lr=0.02)
    values = []
    for _ in range(40):
        outputs = model(**batch)
        loss = objectives(outputs, batch, progress=0).loss - outputs.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] > 2.5
    assert values[-1] < 1.1


def test_a_gate_in_front_and_lower_precision() -> None:
    model, batch = ready(integration="gated addition")
    objectives = Objectives(model, TERM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = objectives(model(**batch), batch, progress=0)
    assert total.parts["load-balance"].dtype is torch.float32
    total.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


# Recomputation, slices, copies


def gradients(model: Any, *batches: dict[str, Tensor], terms: Any = TERM) -> list[Tensor]:
    objectives = Objectives(model, terms)
    for batch in batches:
        objectives(model(**batch, use_cache=False), batch, progress=0).loss.backward()
    return [p.grad for p in gw.adapters(model)["default"].parameters()]


def test_recomputing_activations_changes_nothing() -> None:
    terms = [*TERM, Consistency(weight=0.1), Orthogonality(weight=0.1)]
    plain = gradients(*ready(), terms=terms)
    model, batch = ready()
    enable_checkpointing(model)
    for one, other in zip(gradients(model, batch, terms=terms), plain, strict=True):
        torch.testing.assert_close(one, other)
    assert gw.engine.attach.state_of(model).assigned == ()


def test_reentrant_recomputation_is_refused() -> None:
    model, batch = ready()
    enable_checkpointing(model, reentrant=True)
    objectives = Objectives(model, TERM)
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    with pytest.raises(StateError, match="use_reentrant=False"):
        objectives(model(**batch, use_cache=False), batch, progress=0)


def test_gradients_of_slices_add_up() -> None:
    """Each slice has a term of its own; nothing of another slice, or of a forward between, is in it."""
    model, batch = ready()
    slices = [{name: each[rows] for name, each in batch.items()} for rows in (slice(0, 2), slice(2, 3))]
    alone = [gradients(*_again(model, one)) for one in slices]
    objectives = Objectives(model, TERM)
    for one in slices:
        outputs = model(**one)
        objectives(outputs, one, progress=0).loss.backward()
        with torch.no_grad():
            model(**batch)
    for whole, *parts in zip(gw.adapters(model)["default"].parameters(), *alone, strict=True):
        torch.testing.assert_close(whole.grad, sum(parts))


def _again(model: Any, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    twin = copy.deepcopy(model)
    twin.zero_grad()
    return twin, batch


def test_a_model_that_has_run_is_copied_and_pickled() -> None:
    model, batch = ready()
    Objectives(model, TERM)
    model(**batch)
    torch.save(copy.deepcopy(model), io.BytesIO())


def test_a_compiled_model_has_the_same_term() -> None:
    model, batch = ready()
    objectives = Objectives(model, TERM)
    plain = objectives(model(**batch), batch, progress=0)
    run = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        again = objectives(run(**batch, use_cache=False), batch, progress=0)
        torch.testing.assert_close(again.loss, plain.loss)


# What is refused


def test_models_without_a_router_that_trains_are_refused() -> None:
    model, batch = ready()
    objectives = Objectives(model, TERM)
    with gw.trainable(model):
        outputs = model(**batch)
    with pytest.raises(NothingMatches, match="no trainable router"):
        objectives(outputs, batch, progress=0)
    with pytest.raises(NothingMatches, match="before the forward"):
        objectives(outputs, batch, progress=0)
    gw.detach(model)
    gw.attach(model, gw.LoRA(rank=2))
    objectives = Objectives(model, TERM)
    with pytest.raises(NothingMatches, match="mixture-of-lora"):
        objectives(model(**batch), batch, progress=0)


def test_without_a_router_in_its_terms_nothing_is_kept() -> None:
    model, batch = ready()
    state = gw.engine.attach.state_of(model)
    Objectives(model, [Orthogonality(weight=1)])(model(**batch), batch, progress=0)
    assert not state.assigning
    assert not state.assigned
