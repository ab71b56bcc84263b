"""graftwork compose: names, methods, messages."""

from __future__ import annotations

from pathlib import Path

import pytest

import graftwork as gw
from graftwork.adapters.format import read_own
from graftwork.cli import main as entry
from graftwork.laws import stir
from graftwork.testing import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files a, b and toxic."""
    place, model = tmp_path_factory.mktemp("adapters"), tiny("llama")
    for seed, name in enumerate(("a", "b", "toxic")):
        stir(gw.attach(model, gw.LoRA(rank=2), name=name), seed=seed)
        gw.save(model, place, name=name)
    return place


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        entry.main(["compose", *map(str, arguments)])
    printed = capsys.readouterr()
    return int(left.value.code or 0), printed.out, printed.err


def test_an_expression_over_a_folder(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    code, text, _ = run(capsys, "a + 0.5*b - toxic", folder, "--out", out)
    assert code == 0
    assert text.strip() == str(out / "c.safetensors")
    wanted = gw.compose(folder, "a + 0.5*b - toxic", name="wanted").path
    assert wanted is not None
    assert read_own(out / "c.safetensors").tensors.keys() == read_own(wanted).tensors.keys()
    wanted.unlink()


def test_names_given_as_paths(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    code, text, _ = run(
        capsys,
        "-x",
        f"x={folder / 'toxic.safetensors'}",
        "--out",
        tmp_path,
        "--name",
        "clean",
        "--through",
        "down",
    )
    assert code == 0
    assert text.strip() == str(tmp_path / "clean.safetensors")


def test_retained_energy_is_said(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    options = ("--method", "ties", "--rank", 1, "--density", 0.5)
    code, text, _ = run(capsys, "a + b", folder, "--out", tmp_path / "t", *options)
    assert code == 0
    assert "of the squared norm of the updates retained, least at" in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("a - toxi",), "Did you mean toxic"),
        (("a -",), "position 4 of the expression"),
        (("a + b", "--method", "tie"), "Did you mean ties"),
        (("a + b", "--rank", 2), "'parameters' has no option 'rank'"),
        (("a + b", "x=nowhere", "x=there"), "two adapters are called 'x'"),
        (("a + b", "--ranc", 2), "'--ranc' is neither NAME=PATH nor a folder"),
        (("a + b", "nowhere"), "neither NAME=PATH nor a folder"),
        (("x", "x=nowhere"), "nowhere does not exist"),
    ],
)
def test_one_message_and_nothing_written(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, arguments: tuple[object, ...], word: str
) -> None:
    expression, *rest = arguments
    code, _, err = run(capsys, expression, folder, *rest, "--out", tmp_path / "out")
    assert code == 2
    assert word in " ".join(err.split())
    assert not (tmp_path / "out").exists()
