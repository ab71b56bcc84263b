"""Every part runs on thin hosts, and its figures agree with counts made by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_hosts import BERT, LLAMA

from graftwork.bench.parts import crowd, files, inactive, many, merge, mixed, peak, saved, shelf, step
from graftwork.bench.settings import Settings
from graftwork.bench.table import Table
from graftwork.bench.variants import FLOOR, FULL, variants

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
HIDDEN, INNER, VOCABULARY, LAYERS = 32, 48, 64, 2
NORMS = (2 * LAYERS + 1) * HIDDEN
FULL_SIZE = 2 * VOCABULARY * HIDDEN + LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER) + NORMS
LORA = LAYERS * 16 * (4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + INNER))


def bed(**changes: Any) -> Settings:
    return dataclasses.replace(Settings(hosts=(LLAMA,), dtypes=("fp32",), rounds=1), **changes)


def column(table: Table, heading: str) -> dict[str, Any]:
    at = table.headings.index(heading)
    return {str(row[0]): row[at] for row in table.rows}


def test_saved_bytes_trained_parameters_and_ratios() -> None:
    (table,) = saved.measure(bed())
    assert table.notes == [], "both libraries train the same parameters, and nothing failed"
    trained = column(table, "trained")
    assert trained[FLOOR] == 0
    assert trained[FULL] == FULL_SIZE
    assert trained["LoRA r16, all linears"] == LORA
    assert trained["(IA)3"] == LAYERS * (2 * HIDDEN + INNER)
    assert trained["prefix tuning, 20"] == LAYERS * 20 * 2 * HIDDEN
    assert trained["prompt tuning, 20"] == 20 * HIDDEN
    assert trained["norm tuning"] == NORMS
    kept = column(table, "MiB")
    assert kept["LoRA r16, dropout 0.05"] == kept["LoRA r16, all linears"]
    assert column(table, "/ floor")["(IA)3"] == pytest.approx(kept["(IA)3"] / kept[FLOOR])
    assert column(table, "/ full")[FULL] == 1
    theirs = column(table, "peft MiB")["(IA)3"]
    assert column(table, "/ peft")["(IA)3"] == pytest.approx(kept["(IA)3"] / theirs)


def test_peak_holds_at_least_what_is_saved_and_the_gradients() -> None:
    chosen = tuple(v for v in variants() if v.name in ("LoRA r16, all linears", "norm tuning"))
    (table,), (small,) = peak.measure(bed(), chosen), saved.measure(bed(), chosen)
    high, low = column(table, "MiB"), column(small, "MiB")
    assert all(high[name] > low[name] for name in high)
    assert high[FULL] > FULL_SIZE * 4 / 2**20
    adam = column(table, "in all")[FULL] - high[FULL]
    assert adam == pytest.approx(3 * FULL_SIZE * 4 / 2**20, rel=0.01)  # weights and two moments


def test_steps_of_an_encoder_with_a_head() -> None:
    chosen = tuple(v for v in variants() if v.name in ("(IA)3", "bottleneck adapter", "LoRA r16, lean host"))
    (table,) = step.measure(bed(hosts=(BERT,), dtypes=("bf16",)), chosen)
    milliseconds = column(table, "ms")
    assert milliseconds["(IA)3"] > 0
    assert milliseconds["LoRA r16, lean host"] is None, "an encoder has nothing for it"
    assert column(table, "peft ms")["bottleneck adapter"] is None, "the peer has none"
    assert table.notes == []


def test_a_variant_that_fails_is_a_note_and_the_rest_goes_on() -> None:
    def broken(host: object) -> object:
        raise ValueError("no such thing")

    first = dataclasses.replace(variants()[0], peer=broken)
    (table,) = saved.measure(bed(), (first,))
    assert table.notes == ["LoRA r16, all linears, peft: ValueError: no such thing"]
    assert column(table, "MiB")[first.name] > 0
    assert column(table, "/ peft")[first.name] is None


def test_without_the_peer_its_columns_are_empty_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftwork.bench.peer.available", lambda: False)
    (table,) = saved.measure(bed(), variants()[:1])
    assert column(table, "peft MiB")["LoRA r16, all linears"] is None
    assert "peft is not installed" in table.notes[0]
    assert "peft is not installed" in mixed.measure(bed(), (1, 2))[0].notes[0]


def test_the_eight_adapters_of_a_mixed_batch_are_those_of_its_rows() -> None:
    """The action that is timed answers what the rows answer one adapter at a time."""
    from graftwork.engine.verbs import active

    model = mixed.own_model(LLAMA.make())
    ids = torch.randint(3, LLAMA.vocabulary, (mixed.ROWS, 4))
    with torch.no_grad():
        for case, rows in mixed.INDICES.items():
            together: Any = mixed.own_cases(model, ids)[case]()
            for row in (0, 5, 15):
                with active(model, mixed.NAMES[rows[row]]):
                    alone = model(input_ids=ids[row : row + 1]).logits[0]
                torch.testing.assert_close(together.logits[row], alone, rtol=1e-4, atol=1e-5)


def test_parts_about_many_adapters_files_and_merging() -> None:
    (table,) = many.measure(bed(), count=2)
    assert [row[0] for row in table.rows] == ["1", "2"]
    (table,) = inactive.measure(bed())
    assert column(table, "/ bare")["bare host"] == 1
    (table,) = merge.measure(bed(dtypes=("bf16",)))
    assert table.rows[0][-1] == "0.00%"
    assert [goal.verdict for goal in table.goals] == ["reached"]
    (table,) = files.measure(bed())
    assert column(table, "KiB on disk")["graftwork"] > LORA * 4 / 1024


def test_a_crowd_of_adapters_and_tokens_of_two_domains() -> None:
    (table,) = crowd.measure(bed(), count=3, lengths=(1,))
    assert [row[:2] for row in table.rows] == [
        ("3 x 1", crowd.ONE),
        ("3 x 1", crowd.EACH),
        (f"{crowd.ROWS} x {crowd.TOKENS}", crowd.ONE),
        (f"{crowd.ROWS} x {crowd.TOKENS}", crowd.DOMAINS),
        (f"{crowd.ROWS} x {crowd.TOKENS}, trained", crowd.ONE),
        (f"{crowd.ROWS} x {crowd.TOKENS}, trained", crowd.DOMAINS),
    ]
    assert all(row[2] > 0 for row in table.rows)


def test_a_shelf_holds_no_more_on_the_model_than_it_has_places() -> None:
    (table,) = shelf.measure(bed(), registered=5, used=2)
    attached, few, many = (row[4] for row in table.rows)
    one = LAYERS * 2 * shelf.RANK * 2 * HIDDEN * 4 / 2**20
    assert attached == few == many == pytest.approx(2 * one)
    assert [row[5] for row in table.rows] == [None, pytest.approx(2 * one), pytest.approx(5 * one)]
