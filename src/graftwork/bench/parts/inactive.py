"""What an attached adapter costs while it is switched off: a decoding step against the bare host."""

from __future__ import annotations

import torch

from graftwork.bench import peer
from graftwork.bench.hosts import Host, share
from graftwork.bench.measure import interleaved
from graftwork.bench.parts.mixed import own_model, peer_model
from graftwork.bench.settings import DTYPES, Settings
from graftwork.bench.table import Goal, Table
from graftwork.bench.variants import base_of

PART = "inactive"
ROWS = 16
LEAST = 0.02  # a difference below this is not told apart from chance, even where two bare hosts agree better
BARE, AGAIN, OWN, OTHER = (
    "bare host",
    "bare host again",
    "graftwork, 8 attached, none active",
    "disable_adapter()",
)


def measure(settings: Settings) -> list[Table]:
    """One table per causal host and precision; the bare host measured twice shows what chance does."""
    return [_table(settings, host, name) for host in settings.causal for name in settings.dtypes]


def _table(settings: Settings, host: Host, dtype: str) -> Table:
    from graftwork.engine.verbs import active

    base = base_of(host, DTYPES[dtype], settings.device).eval()
    bare, again, own = share(base), share(base), own_model(share(base))
    active(own)
    ids = torch.randint(3, host.vocabulary, (ROWS, 1), device=settings.device)
    actions = {
        BARE: lambda: bare(input_ids=ids),
        OWN: lambda: own(input_ids=ids),
        AGAIN: lambda: again(input_ids=ids),
    }
    if peer.available():
        other = peer_model(share(base), host)

        def disabled() -> None:
            with other.disable_adapter():
                other(input_ids=ids)

        actions[f"{peer.NAME}, {OTHER}"] = disabled
    with torch.no_grad():
        times = interleaved(actions, settings.rounds * 8, device=settings.device, warmup=2)
    rows = [
        (name, time.median * 1e3, f"{time.spread:.0%}", time.over(times[BARE]))
        for name, time in times.items()
    ]
    table = Table(
        PART, f"{host.name}, {ROWS} x 1 token; base in {dtype}, {settings.device}",
        ("case", "ms", "spread", "/ bare"), list(rows),
    )  # fmt: skip
    if host.name == "llama":
        chance = max(LEAST, abs(times[AGAIN].over(times[BARE]) - 1))
        table.goals.append(
            Goal(f"inactive, {dtype}: of the bare host", 1 + chance, times[OWN].over(times[BARE]), "x")
        )
    return table
