"""Prompts that differ from row to row, and prompts that stay in the output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graftwork.engine.attach import attach
from graftwork.engine.verbs import active, adapters, route
from graftwork.errors import RouteError, StateError
from graftwork.techniques.prompt_tuning import PromptTuning
from graftwork.testing import tiny, tiny_batch

FAMILIES = ("bert-base", "llama-base", "vit-base", "gpt2-base")


def prompts(model: nn.Module, name: str) -> list[nn.Module]:
    return list(adapters(model)[name].modules.values())


def give(model: nn.Module, name: str, values: Tensor) -> None:
    """Let an adapter's prompt answer `values`, (N, C) or (B, N, C)."""
    for module in prompts(model, name):
        module.forward = lambda: values  # type: ignore[method-assign]


def one_row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: values[row : row + 1] for name, values in batch.items()}


def made(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    model = tiny(name)
    for adapter in ("a", "b"):
        attach(model, PromptTuning(length=4), name=adapter)
    return model, tiny_batch(name), torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_their_own_equal_one_row_at_a_time(name):
    model, batch, own = made(name)
    give(model, "a", own)
    with torch.no_grad():
        together = model(**batch).last_hidden_state
        for row in range(3):
            give(model, "a", own[row])
            alone = model(**one_row(batch, row)).last_hidden_state
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_their_own_beside_a_shared_prompt_routed_and_stacked(name):
    model, batch, own = made(name)
    give(model, "a", own)
    with torch.no_grad():
        with route(model, ["a", "b"], torch.tensor([1, 0, -1])):
            routed = model(**batch).last_hidden_state
        expected = []
        for row, running in enumerate([("b",), ("a",), ()]):
            give(model, "a", own[row])
            with active(model, *running):
                expected.append(model(**one_row(batch, row)).last_hidden_state)
        torch.testing.assert_close(routed, torch.cat(expected), atol=1e-5, rtol=1e-5)
        give(model, "a", own)
        with active(model, "a", "b"):
            stacked = model(**batch).last_hidden_state
            give(model, "a", own[2])
            alone = model(**one_row(batch, 2)).last_hidden_state
    torch.testing.assert_close(stacked[2:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_that_stays_leaves_its_positions_in_the_output(name):
    model, batch, _ = made(name)
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with torch.no_grad(), active(model, "a"):
        plain = model(**batch).last_hidden_state
        for module in prompts(model, "a"):
            module.stays = True  # type: ignore[assignment]
        whole = model(**batch).last_hidden_state
    assert whole.shape[1] == plain.shape[1] + 4
    start = 1 if name in ("vit-base", "bert-base") else 0  # a leading CLS stays first
    kept = torch.cat([whole[:, :start], whole[:, start + 4 :]], dim=1)
    torch.testing.assert_close(kept, plain, atol=1e-6, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    model, batch, own = made("bert-base")
    give(model, "a", own[:2])
    with pytest.raises(RouteError, match="made for 2 rows, now there are 3"), active(model, "a"):
        model(**batch)
    give(model, "a", own)
    for module in prompts(model, "a"):
        module.stays = True  # type: ignore[assignment]
    with pytest.raises(StateError, match="'a' stays in the output"), active(model, "a", "b"):
        model(**batch)
