"""Writing so that a reader, or a kill at any moment, finds the old content or the new one, nothing between.

The new content goes into a temporary file in the same folder, reaches the disk, and then takes the old file's
place in one step. The temporary file's name carries host and process, so that what a killed process left
behind can be told from what a living one is writing, and goes with the next save.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_count = itertools.count()


def write_atomically(target: Path, write: Callable[[BinaryIO], None]) -> None:
    """Give `target` the content that `write` produces, in one step. On any error `target` is as before."""
    part = stage(target, write)
    try:
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    flush_folder(target.parent)


def stage(target: Path, write: Callable[[BinaryIO], None]) -> Path:
    """The finished content in a temporary file beside `target`, safely on disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    part = target.with_name(f".{target.name}.{_host()}-{os.getpid()}-{next(_count)}.part")
    try:
        with open(part, "xb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


def flush_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut (where the system lets folders be opened)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:40] or "host"


def _sweep(target: Path) -> None:
    """Remove what processes of this host left behind when they were killed while writing `target`."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{_host()}-(\d+)-\d+\.part")
    for entry in target.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match[1])):
            entry.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
