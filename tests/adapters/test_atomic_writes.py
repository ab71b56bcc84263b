"""What is on disk is always one complete version: errors and real kills change nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from graftwork.adapters.disk import write_atomically


def test_a_failing_writer_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "fr.safetensors"
    target.write_bytes(b"old")

    def write(out: BinaryIO) -> None:
        out.write(b"new")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(target, write)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["fr.safetensors"]


def test_a_failing_rename_leaves_no_rubbish(tmp_path: Path) -> None:
    (tmp_path / "fr").mkdir()
    (tmp_path / "fr" / "x").touch()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "fr", lambda out: None)
    assert [p.name for p in tmp_path.iterdir()] == ["fr"]


def test_new_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"x")
    write_atomically(tmp_path / "ours", lambda out: None)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from graftwork.adapters.format import read_own, write_own
from test_own_format import stored
from dataclasses import replace

torch.set_num_threads(1)
target, chance = Path(sys.argv[1]), random.Random(0)
torn = 0
for attempt in range(60):
    child = os.fork()
    if child == 0:
        adapter = stored()
        for number in range(10**6):
            value = float(attempt * 10**6 + number)
            tensors = {name: torch.full((512, 64), value) for name in adapter.tensors}
            write_own(target, replace(adapter, tensors=tensors))
    time.sleep(chance.uniform(0.001, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    torn += any(p.suffix == ".part" for p in target.parent.iterdir())
    if target.exists():
        tensors = read_own(target).tensors
        assert len({float(t.unique()) for t in tensors.values()}) == 1, "old and new mixed"
    if torn >= 12:
        break
write_own(target, stored())
print(torn, *[p.name for p in target.parent.iterdir()])
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_sigkill_at_any_moment_leaves_a_complete_file(tmp_path: Path) -> None:
    target = tmp_path / "fr.safetensors"
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", DRIVER, str(target)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": here}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    torn, *files = done.stdout.split()
    assert int(torn) >= 5, "hardly any kill came while a file was being written"
    assert files == ["fr.safetensors"], "rubbish of killed writers stays"
