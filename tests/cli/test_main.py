"""The command line: verbs, one clean message for an error of the user's, quick help."""

import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.cli import main as entry
from graftwork.errors import BadOption

VERBS = [
    "tune",
    "evaluate",
    "runs",
    "cost",
    "anatomy",
    "techniques",
    "merge",
    "convert",
    "pretrain",
    "demo",
    "docs",
]


def graftwork(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        entry.main(list(arguments))
    printed = capsys.readouterr()
    return int(left.value.code or 0), printed.out, printed.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, _ = graftwork(capsys, verb, "--help")
    assert code == 0
    assert verb in out
    assert verb in graftwork(capsys, "--help")[1]


def test_an_error_of_ours_is_one_message_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: minilm\ntechnique: [lora]\ntask: text-classification\noutput: x\ndata: {trian: y}\n"
    )
    code, out, err = graftwork(capsys, "tune", str(file), "training.epoch=3")
    assert code == 2
    assert out == ""
    assert err.startswith("Error: ")
    assert "training.epochs" in err
    assert "data.train" in err
    assert "Traceback" not in err


def test_text_in_brackets_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entry.leave("choose [bold]one[/bold] of [a, b]")
    assert "choose [bold]one[/bold] of [a, b]" in capsys.readouterr().err


@pytest.mark.parametrize("position", [0, 2])
def test_traceback_at_any_position_shows_where(tmp_path: Path, position: int) -> None:
    arguments = ["techniques", "lorra"]
    arguments.insert(position, "--traceback")
    with pytest.raises(LookupError, match="Did you mean lora"):
        entry.main(arguments)


def test_missing_arguments_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = graftwork(capsys, "tune")
    assert code == 2
    assert "recipe" in err.lower()


def test_options_of_several_techniques() -> None:
    from graftwork.cli.cost import chosen

    found = chosen(["lora", "rank=4", "layers=last 2", "ia3", "bottleneck-adapter", "width=3"])
    assert [t.name for t in found] == ["lora", "ia3", "bottleneck-adapter"]
    assert found[0].options() == {"rank": 4, "layers": "last 2"}
    assert found[2].options() == {"width": 3}
    with pytest.raises(BadOption, match="before any technique"):
        chosen(["rank=4"])


def test_cost_counts_what_attach_makes(capsys: pytest.CaptureFixture[str]) -> None:
    """LoRA on query and value of six layers of a 192-wide Llama with two of six heads for keys and values."""
    code, out, err = graftwork(
        capsys, "cost", "tiny-llama", "lora", "rank=4", "--sequence", "16", "--batch", "2"
    )
    assert code == 0, err
    expected = 6 * 4 * ((192 + 192) + (192 + 64))
    assert f"{expected:,}" in out


def test_anatomy_lists_workspaces(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = graftwork(capsys, "anatomy", "tiny-llama")
    assert code == 0, err
    query = next(line for line in out.splitlines() if line.strip().startswith("attention.query"))
    assert "192 x 192" in query
    assert query.split()[-1] == "6"


def test_unknown_models_are_told_the_nearest(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = graftwork(capsys, "anatomy", "tiny-lama")
    assert code == 2
    assert "tiny-llama" in err


@pytest.mark.slow
def test_help_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, graftwork.cli.main; print(sys.modules.keys() & {'torch', 'transformers'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
