"""What to measure on and how often."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from graftwork.bench.hosts import Host

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Choices of one run.

    Attributes:
        hosts: models to measure training on; parts about serving and files take the causal ones.
        dtypes: names of precisions of the base (`DTYPES`).
        device: "cpu" or "cuda".
        rounds: turns that each training step takes; short actions take more.
    """

    hosts: tuple[Host, ...]
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    device: str = "cpu"
    rounds: int = 5

    def beds(self) -> Iterator[tuple[Host, str, torch.dtype]]:
        """(host, name of the precision, precision), all pairs."""
        for host in self.hosts:
            for name in self.dtypes:
                yield host, name, DTYPES[name]

    @property
    def causal(self) -> tuple[Host, ...]:
        return tuple(host for host in self.hosts if host.task == "causal")
