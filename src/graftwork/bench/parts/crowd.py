"""Sixty-four rows over 64 adapters, and tokens of two domains, each through its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from graftwork.bench import peer
from graftwork.bench.hosts import Host, share
from graftwork.bench.measure import interleaved
from graftwork.bench.parts.mixed import own_model, peer_model
from graftwork.bench.settings import DTYPES, Settings
from graftwork.bench.table import Goal, Table
from graftwork.bench.variants import base_of

PART = "crowd"
COUNT, LENGTHS, TOKENS, ROWS, RANK = 64, (1, 32), 256, 4, 8
HEADINGS = ("rows x tokens", "adapters", "ms", "/ one", f"{peer.NAME} ms", f"{peer.NAME} / its one")
ONE, EACH, DOMAINS = "one adapter", "64, one for each row", "2, by token"
Action = Callable[[], object]


def measure(settings: Settings, count: int = COUNT, lengths: tuple[int, ...] = LENGTHS) -> list[Table]:
    """One table per causal host and precision."""
    return [
        _table(settings, host, name, count, lengths) for host in settings.causal for name in settings.dtypes
    ]


def _table(settings: Settings, host: Host, dtype: str, count: int, lengths: tuple[int, ...]) -> Table:
    base = base_of(host, DTYPES[dtype], settings.device).eval()
    names = [f"a{number}" for number in range(count)]
    own = own_model(share(base), names, RANK)
    other = peer_model(share(base), host, names, RANK) if peer.available() else None
    about = f"{host.name}, LoRA r{RANK} on all linears; base in {dtype}, {settings.device}"
    table = Table(PART, about, HEADINGS)
    for length in lengths:
        ids = torch.randint(3, host.vocabulary, (count, length), device=settings.device)
        actions = {(case, "ours"): act for case, act in _rows(own, ids, names).items()}
        if other is not None:
            actions[ONE, "peer"] = partial(other, input_ids=ids)
            actions[EACH, "peer"] = partial(other, input_ids=ids, adapter_names=names)
        with torch.no_grad():
            _fill(table, f"{count} x {length}", EACH, actions, settings)
    _domains(table, own, host, settings, dtype)
    table.notes = [f"{peer.NAME} has no routes per token"] if peer.available() else [peer.ABSENT]
    return table


def _domains(table: Table, own: nn.Module, host: Host, settings: Settings, dtype: str) -> None:
    ids = torch.randint(3, host.vocabulary, (ROWS, TOKENS), device=settings.device)
    index = (torch.arange(TOKENS) >= TOKENS // 2).long().expand(ROWS, -1)
    forward = _tokens(own, ids, index, lambda: own(input_ids=ids))
    with torch.no_grad():
        _fill(table, f"{ROWS} x {TOKENS}", DOMAINS, forward, settings)

    def step() -> None:
        own(input_ids=ids, labels=ids).loss.backward()
        own.zero_grad()

    ratio = _fill(table, f"{ROWS} x {TOKENS}, trained", DOMAINS, _tokens(own, ids, index, step), settings)
    if host.name == "llama":
        table.goals.append(Goal(f"tokens of 2 domains, {dtype}, trained: of one adapter", 1.15, ratio, "x"))


def _fill(
    table: Table, size: str, case: str, actions: dict[tuple[str, str], Action], settings: Settings
) -> float:
    times = interleaved(actions, settings.rounds, device=settings.device)
    for name in (ONE, case):
        own, theirs = times[name, "ours"], times.get((name, "peer"))
        cells = (None, None) if theirs is None else (theirs.median * 1e3, theirs.over(times[ONE, "peer"]))
        table.rows.append((size, name, own.median * 1e3, own.over(times[ONE, "ours"]), *cells))
    return times[case, "ours"].over(times[ONE, "ours"])


def _rows(model: nn.Module, ids: Tensor, names: Sequence[str]) -> dict[str, Action]:
    from graftwork.engine.verbs import active, route

    def one() -> object:
        with active(model, names[0]):
            return model(input_ids=ids)

    def each() -> object:
        with route(model, names, torch.arange(len(names))):
            return model(input_ids=ids)

    return {ONE: one, EACH: each}


def _tokens(
    model: nn.Module, ids: Tensor, index: Tensor, run: Callable[[], object]
) -> dict[tuple[str, str], Action]:
    from graftwork.engine.verbs import active, route, trainable

    def one() -> object:
        with active(model, "a0"), trainable(model, "a0"):
            return run()

    def both() -> object:
        with route(model, ["a0", "a1"], index), trainable(model, "a0", "a1"):
            return run()

    return {(ONE, "ours"): one, (DOMAINS, "ours"): both}
