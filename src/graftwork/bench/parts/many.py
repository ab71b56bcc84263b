"""Sixty-four adapters on one model: attaching the last against the first, and switching among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from graftwork.bench import peer
from graftwork.bench.hosts import Host, share
from graftwork.bench.measure import interleaved, once
from graftwork.bench.settings import DTYPES, Settings
from graftwork.bench.table import Goal, Table
from graftwork.bench.variants import LINEARS, base_of

PART = "many"
COUNT, MARKS = 64, (1, 2, 8, 16, 32, 64)
SWITCHES = 200


def measure(settings: Settings, count: int = COUNT) -> list[Table]:
    """One table per causal host, in the first precision asked for."""
    return [_table(settings, host, count) for host in settings.causal]


def _table(settings: Settings, host: Host, count: int) -> Table:
    dtype = settings.dtypes[0]
    base = base_of(host, DTYPES[dtype], settings.device)
    own, other = Own(share(base)), Peer(share(base), host) if peer.available() else None
    Own(share(base)).add("imports")  # what the libraries load on first use is no part of attaching
    if other is not None:
        Peer(share(base), host).add("imports")
    headings = ("adapters", "attach, ms", "switch, µs", f"{peer.NAME}: add, ms", f"{peer.NAME}: switch, µs")
    table = Table(PART, f"{host.name}, LoRA r8 on all linears; base in {dtype}, {settings.device}", headings)
    attached: list[float] = []
    for number in range(1, count + 1):
        attached.append(once(lambda: own.add(f"a{number}"), settings.device) * 1e3)  # noqa: B023
        added = None if other is None else once(lambda: other.add(f"a{number}"), settings.device) * 1e3  # noqa: B023
        if number in MARKS:
            switched = switching(own.switch, number)
            theirs = None if other is None else switching(other.switch, number, turns=4)
            table.rows.append((str(number), attached[-1], switched, added, theirs))
    table.notes = [] if peer.available() else [peer.ABSENT]
    table.notes.append("attaching the first adapter also seats the engine on the host's modules")
    if host.name == "llama":
        last = table.rows[-1][2]
        assert isinstance(last, float)
        table.goals = [
            Goal(f"attaching adapter {count}: of the first", 3.0, min(attached[-3:]) / attached[0], "x"),
            Goal(f"switching among {count}", 20.0, last, "µs"),
        ]
    return table


def switching(switch: Callable[[str], object], count: int, turns: int = SWITCHES) -> float:
    """Median microseconds of one switch, going round all adapters."""
    names = [f"a{1 + number % count}" for number in range(turns)]

    def go_round() -> None:
        for name in names:
            switch(name)

    return interleaved({"": go_round}, 3)[""].median / turns * 1e6


class Own:
    """Adapters of ours on one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def add(self, name: str) -> None:
        from graftwork.engine.attach import attach
        from graftwork.techniques.lora import LoRA

        attach(self.model, LoRA(rank=8, workspaces=LINEARS), name=name)

    def switch(self, name: str) -> None:
        from graftwork.engine.verbs import active

        active(self.model, name)


class Peer:
    """The same with the peer; its first adapter comes with the wrapping."""

    def __init__(self, model: nn.Module, host: Host) -> None:
        self.base, self.host, self.model = model, host, None

    def add(self, name: str) -> None:
        wanted: Any = peer.lora(self.host, rank=8)
        if self.model is None:
            self.model = peer.wrap(self.base, wanted, name)
        else:
            self.model.add_adapter(name, wanted)

    def switch(self, name: str) -> None:
        assert self.model is not None
        self.model.set_adapter(name)
