"""The shape of the code: imports point one way, files and functions stay small, importing stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "graftwork"
FILES = sorted(SOURCE.rglob("*.py"))
ORDER = (
    "errors",
    "reference",
    "anatomy",
    "engine",
    "optimizers",
    "objectives",
    "initialisers",
    "routing",
    "techniques",
    "adapters",
    "composition",
    "data",
    "models",
    "tasks",
    "analysis",
    "training",
    "serving",
    "continual",
    "bench",
    "studies",
    "cli",
)
SAME_HEIGHT = {"data", "models", "tasks", "analysis"}


def folder(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Folders of graftwork that a file imports when it is imported itself or later."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("graftwork."):
            names.add(node.module.split(".")[1])
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("graftwork.")}
    return names


@pytest.mark.parametrize(
    "path", [f for f in FILES if folder(f) in ORDER], ids=lambda p: str(p.relative_to(SOURCE))
)
def test_imports_point_one_way(path: Path) -> None:
    own = ORDER.index(folder(path))
    above = {name for name in imported(path) if name in ORDER and ORDER.index(name) > own}
    if folder(path) in SAME_HEIGHT:
        above -= SAME_HEIGHT
    assert not above, f"imports {sorted(above)}, which stand above {folder(path)}"


def test_every_folder_has_its_place() -> None:
    known = {*ORDER, "__init__", "__main__", "laws", "testing"}
    assert {folder(path) for path in FILES} <= known


def test_the_engine_names_no_technique() -> None:
    names = {path.stem for path in (SOURCE / "techniques").glob("*.py")} - {"__init__"}
    for path in (SOURCE / "engine").glob("*.py"):
        assert "graftwork.techniques" not in path.read_text(), path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                assert not constants & {name.replace("_", "-") for name in names}, f"{path}: {constants}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_a_technique_is_one_small_file() -> None:
    for path in (SOURCE / "techniques").glob("*.py"):
        assert len([line for line in path.read_text().splitlines() if line.strip()]) <= 120, path


def functions() -> list[tuple[str, int, bool]]:
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                found.append((f"{path.relative_to(SOURCE)}:{node.name}", length, node.returns is not None))
    return found


def test_functions_are_small_and_typed() -> None:
    lengths = sorted(length for _, length, _ in functions())
    assert lengths[len(lengths) // 2] <= 10
    assert lengths[int(len(lengths) * 0.9)] <= 30
    allowed = ("lowrank.py", "lean.py")  # methods of autograd functions, whose context is not typed
    untyped = [
        name for name, _, typed in functions() if not typed and not name.split(":")[0].endswith(allowed)
    ]
    assert not untyped, untyped


def test_importing_loads_torch_and_little_else() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import graftwork as gw; gw.LoRA(rank=2); gw.attach; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "transformers",
        "accelerate",
        "datasets",
        "pydantic",
        "sklearn",
        "scipy",
        "matplotlib",
        "pandas",
        "rich",
    }
    assert not heavy & set(out)
