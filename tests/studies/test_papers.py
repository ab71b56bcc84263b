"""The studies' own parts: tokenizer, tasks, recipes, and verdicts that follow the figures."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graftwork.errors import BadData
from graftwork.studies.cells import Cell, Cells
from graftwork.studies.data_to_text import Generation
from graftwork.studies.orders import pairs, summary
from graftwork.studies.orders import table as orders_table
from graftwork.studies.papers import natural_galore, sst2, weight_space
from graftwork.studies.rates import best_rate
from graftwork.studies.session import Session
from graftwork.studies.stories import prepare, tokenizer
from graftwork.studies.study import Settings
from graftwork.training.recipe import Recipe

SPECIAL = {"<unk>": 0.0, "\n<s>\n": 0.0, "\n</s>\n": 0.0}
PIECES = [" t", "he", " the", "hen", "th", " then", "n ", "t", "h", "e", "n", " ", "a"]


def made(arm: str, values: Sequence[float], figure: str = "score", **others: float) -> list[Cell]:
    return [
        Cell(
            arm=arm,
            task="t",
            seed=seed,
            given={},
            figures={figure: value, **others},
            curves={},
            seconds=1.0,
            machine="m",
            versions={},
        )
        for seed, value in enumerate(values)
    ]


# stories260k


def scores() -> dict[str, float]:
    """Three marks, 256 bytes, pieces with falling scores."""
    octets = {f"<0x{n:02X}>": 0.0 for n in range(256)}
    return SPECIAL | octets | {piece: -float(n) for n, piece in enumerate(PIECES)}


def by_hand(text: str, known: Mapping[str, float]) -> list[str]:
    """The definition: characters, then the adjacent pair whose joined piece scores highest, until none is left."""
    parts = [piece for char in " " + text for piece in _characters(char, known)]
    while True:
        joined = [(known[a + b], -n) for n, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in known]
        if not joined:
            return parts
        place = -max(joined)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def _characters(char: str, known: Mapping[str, float]) -> list[str]:
    return [char] if char in known else [f"<0x{octet:02X}>" for octet in char.encode()]


@pytest.mark.parametrize("text", ["then", "the then a hen", "thent heathen", "é\nthe", "t h e", "aaa then"])
def test_the_stories_tokenizer_merges_by_score(text: str) -> None:
    known = scores()
    made_one = tokenizer(known)
    ids = made_one(text)["input_ids"]
    names = list(known)
    assert [names[n] for n in ids[1:]] == by_hand(text, known)
    assert ids[0] == 1
    assert made_one("")["input_ids"] == [1]
    assert made_one.decode(ids, skip_special_tokens=True) == text


def test_a_folder_that_is_no_stories_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BadData, match=r"has no config\.json, vocab\.jsonl"):
        prepare(tmp_path, tmp_path / "out")


# Orders


def test_orders_are_counted_by_sign_and_clearness() -> None:
    cells = {
        "a": made("a", (0.9, 0.91, 0.92)),
        "b": made("b", (0.8, 0.81, 0.83)),
        "c": made("c", (0.8, 0.95, 0.7)),
    }
    found = {"T": pairs(cells, [("a", "b"), ("b", "a"), ("a", "c")])}
    text = summary(found)
    assert "Of 3 comparisons that the papers order, 2 have the papers' sign" in text
    assert "1 of them clearly (a over b on T); 1 are clearly reversed (b over a on T)" in text
    shown = dict(row for row in orders_table(found).rows)
    assert shown["a over b"].startswith("**9.7 ± ")
    assert not shown["a over c"].startswith("**")


# Natural GaLore


@pytest.mark.parametrize(
    ("natural", "words"),
    [((3.0, 3.1), "appeared: "), ((3.2, 3.1), "was not seen clearly"), ((3.4, 3.5), "did not appear")],
)
def test_the_verdict_on_natural_galore_follows_the_losses(natural: tuple[float, ...], words: str) -> None:
    arms = {"AdamW": ((3.0, 3.1), 400.0), "GaLore": ((3.1, 3.2), 100.0), "Natural GaLore": (natural, 200.0)}
    damped = next(iter(natural_galore.DAMPED))
    arms[damped] = (3.0, 3.1), 200.0
    cells = {arm: made(arm, values, "loss", **{"state bytes": size}) for arm, (values, size) in arms.items()}
    text = natural_galore.verdict(cells, damped)
    assert words in text
    assert f"({damped.split(', ')[1]}, the best of 3 tried) it is lower than GaLore's, by -0.100" in text
    assert "2.00 times GaLore's and 0.50 times AdamW's" in text


def test_update_times_are_there_for_each_optimiser() -> None:
    plan = natural_galore.Plan(width=32, layers=1, rank=4, refresh=3, steps=1, evaluated=4)
    rows = torch.zeros(8, 16, dtype=torch.long)
    found = natural_galore.times(plan, natural_galore.Corpus("made up", rows, rows, rows)).figures
    assert set(found) == {*natural_galore.TIMED, natural_galore.GRADIENT}
    assert min(found.values()) > 0


def test_a_rate_at_the_end_of_those_tried_is_told() -> None:
    low, middle = natural_galore.RATES[:2]
    assert natural_galore.edges({"GaLore": middle}) == []
    assert (
        "AdamW's best rate is the lowest tried" in natural_galore.edges({"AdamW": low, "GaLore": middle})[0]
    )


def test_the_rate_rises_and_falls_as_in_galores_scripts() -> None:
    rates = [natural_galore.factor(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(rates) == 1.0
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("arm", list(natural_galore.OPTIMIZERS))
def test_each_optimiser_learns_in_a_short_run(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that repeat: the loss falls below that of guessing; AdamW's state is two numbers for each parameter."""
    plan = natural_galore.Plan(width=32, layers=1, rank=4, refresh=4, steps=12, evaluated=4)
    monkeypatch.setattr(natural_galore, "BATCH", 4)
    rows = torch.arange(64).remainder(8).repeat(16, 1)
    corpus = natural_galore.Corpus("made up", rows, rows, rows)
    found = natural_galore.pretrain(arm, 0, 1e-2, plan, corpus).figures
    assert found["loss"] < math.log(natural_galore.VOCABULARY)
    if arm == natural_galore.ADAMW:
        parameters = natural_galore.LlamaForCausalLM(plan.config()).num_parameters()
        assert 0 <= found["state bytes"] - 8 * parameters < 200  # and a step count for each tensor


# Weight space


def test_every_recipe_of_weight_space_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    files = {"train": str(tmp_path / "a.jsonl"), "validation": "b.jsonl", "test": "c.jsonl"}
    session = Session(Settings(), Cells(Path("nowhere.jsonl")))
    told = Generation("G", "tiny-llama", "tiny-llama", files, ())
    beds = [
        *weight_space._sentence_beds(session, weight_space.SMALL),
        weight_space._generation_bed(told, weight_space.SMALL),
    ]
    for bed, arm in itertools.product(beds, weight_space.ARMS):
        for rate in bed.rates(arm):
            recipe = Recipe.of({**bed.recipe(arm, rate, 1), "output": "out"})
            names = {term.name for term in recipe.objectives}
            assert ("singular-values" in names) == (arm == "KaSA")
            assert ("consistency" in names) == (arm == "BA-LoRA")
            assert recipe.training.seed == 1


def test_the_verdict_on_weight_space_names_who_is_best() -> None:
    level = {"LoRA": 0.5, "PiSSA": 0.6, "DoRA": 0.55, "KaSA": 0.7, "BA-LoRA": 0.9, weight_space.FULL: 0.8}
    cells = {arm: made(arm, (value, value + 0.01, value + 0.021)) for arm, value in level.items()}
    cells["KaSA"] = made("KaSA", (0.7, 0.712, 0.722))
    text = weight_space.verdict({"T": pairs(cells, weight_space.ORDERS)}, {"T": cells})
    assert "KaSA's order is only partly reproduced" in text
    assert "clearly reversed (KaSA over full fine-tuning on T)" in text
    assert "Highest mean: T, BA-LoRA." in text


# Rates


def test_the_rate_is_chosen_by_score_then_loss() -> None:
    def at(score: float, loss: float) -> Cell:
        return made("a", [score], "choice score", **{"choice loss": loss})[0]

    assert best_rate({1.0: at(0.5, 0.1), 2.0: at(0.6, 0.9), 3.0: at(0.6, 0.8)}) == 3.0
    assert best_rate({1.0: at(0.0, math.nan), 2.0: at(0.0, 5.0)}) == 2.0
    losses = {
        rate: made("a", [loss], "choice loss")[0] for rate, loss in ((1.0, 0.3), (2.0, 0.2), (3.0, math.nan))
    }
    assert best_rate(losses) == 2.0


def test_sst2_needs_its_data_and_judges_by_its_goal() -> None:
    with pytest.raises(BadData, match="needs the folder sst2"):
        sst2.run(Session(Settings(), Cells(Path("nowhere.jsonl"))))
    for low, word in ((0.80, "Yes: LoRA reaches 98.8%"), (0.70, "No: LoRA reaches 86.4%")):
        arms = {sst2.LORA: made("l", [low], trained=10.0), sst2.FULL: made("f", [0.81], trained=1000.0)}
        assert sst2.verdict(arms).startswith(word)


def test_cells_are_json(tmp_path: Path) -> None:
    assert json.loads(made("a", [1.0])[0].line())["figures"] == {"score": 1.0}
