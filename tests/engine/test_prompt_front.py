"""Prompts before the very first position, where a summary position (CLS) otherwise stays first."""

from __future__ import annotations

import pytest
import torch
from grafting import answer, gap, prompt, rows_of
from torch import Tensor, nn

from graftwork.engine.attach import attach
from graftwork.engine.verbs import active, route
from graftwork.errors import StateError
from graftwork.testing import tiny, tiny_batch

BATCH = 3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def prompted(name: str, fronts: dict[str, tuple[int, bool]]) -> nn.Module:
    model = tiny(name)
    for adapter, (length, front) in fronts.items():
        made = attach(model, prompt(length, front=front), name=adapter, head=False)
        for parameter in made.parameters():
            parameter.data.normal_()
    return model


def by_hand(name: str, rows: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(own positions' hidden states, summary) of the bare stack, given embeddings with the prompt in front."""
    bare, count = tiny(name), len(batch["input_ids"])
    words = bare.get_input_embeddings()(batch["input_ids"])
    given = torch.cat([rows.expand(count, -1, -1), words], 1)
    mask = torch.cat([torch.ones(count, len(rows), dtype=torch.long), batch["attention_mask"]], 1)
    out = bare(inputs_embeds=given, attention_mask=mask)
    return out.last_hidden_state[:, len(rows) :], out.pooler_output


@pytest.mark.parametrize("name", ["bert-base", "roberta-base"])
def test_a_prompt_in_front_is_the_stack_on_longer_embeddings(name: str) -> None:
    model = prompted(name, {"a": (4, True)})
    ids = torch.randint(3, 99, (BATCH, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][1, 5:] = 0
    rows = next(p for n, p in model.named_parameters() if n.endswith("prompt"))
    kept = batch["attention_mask"].bool()
    if name.startswith("roberta"):  # it counts positions along ids that are no padding
        ids[~kept] = model.config.pad_token_id
    with torch.no_grad():
        hidden, summary = by_hand(name, rows, batch)
        out = model(**batch)
        assert gap(out.last_hidden_state[kept], hidden[kept]) < 1e-5
        assert gap(out.pooler_output, summary) < 1e-5
        behind = prompted(name, {"a": (4, False)})
        next(p for n, p in behind.named_parameters() if n.endswith("prompt")).copy_(rows)
        assert gap(behind(**batch).pooler_output, summary) > 0.01


@pytest.mark.parametrize("name", ["bert", "bert-classification", "roberta", "vit"])
def test_routed_rows_in_front_behind_and_without_are_each_alone(name: str) -> None:
    model = prompted(name, {"a": (5, True), "b": (9, False)})
    batch = tiny_batch(name)
    for order in (["a", "b", None], ["a", None, "a"], ["b", "a", "b"]):
        index = torch.tensor([-1 if who is None else ["a", "b"].index(who) for who in order])
        with torch.no_grad(), route(model, ["a", "b"], index):
            routed = answer(model, batch)
        with torch.no_grad():
            assert gap(routed, rows_of(model, batch, order)) < 1e-5


def test_where_nothing_stays_first_the_front_is_where_prompts_go_anyway() -> None:
    batch = tiny_batch("llama")
    answers = []
    for front in (True, False):
        torch.manual_seed(0)
        with torch.no_grad():
            answers.append(answer(prompted("llama", {"a": (4, front)}), batch))
    assert torch.equal(*answers)


def test_one_row_cannot_have_prompts_on_both_sides_of_cls() -> None:
    model = prompted("bert", {"a": (5, True), "b": (9, False)})
    with active(model, "a", "b"), pytest.raises(StateError, match="'a' go before the first position and 'b'"):
        model(**tiny_batch("bert"))
