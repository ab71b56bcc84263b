"""How long importing takes, each statement in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from graftwork.bench import peer
from graftwork.bench.measure import interleaved
from graftwork.bench.settings import Settings
from graftwork.bench.table import Goal, Table

PART = "imports"
TORCH, OWN = "import torch", "import torch, graftwork"
USED = "import torch, graftwork; graftwork.attach, graftwork.LoRA"
LIMIT = 0.3


def measure(settings: Settings) -> list[Table]:
    """One table; statements take turns, one round to warm the disk's cache."""
    statements = [TORCH, OWN, USED, *([f"import torch, {peer.NAME}"] if peer.available() else [])]
    times = interleaved({s: partial(_run, s) for s in statements}, settings.rounds)
    base = times[TORCH]
    table = Table(PART, "fresh interpreters", ("statement", "s", "spread", "s over torch"))
    for statement, time in times.items():
        table.rows.append((statement, time.median, f"{time.spread:.0%}", time.median - base.median))
    more = times[OWN].median - base.median
    table.goals.append(Goal("import graftwork, over import torch", LIMIT, more, "s"))
    return [table]


def _run(statement: str) -> None:
    subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)
