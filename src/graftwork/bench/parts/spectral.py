"""Top singular directions of a large matrix: randomised against exact, time and captured energy."""

from __future__ import annotations

import time

import torch

from graftwork.bench.settings import Settings
from graftwork.bench.table import Goal, Table
from graftwork.initialisers.matrices import top_singular

PART = "spectral"
WIDTH, RANK = 4096, 16


def measure(settings: Settings) -> list[Table]:
    """One table: a matrix whose singular values fall as those of trained weights do."""
    matrix = spectrum(WIDTH).to(settings.device)
    begun = time.perf_counter()
    values = torch.linalg.svd(matrix, full_matrices=False)[1]
    exact = time.perf_counter() - begun
    begun = time.perf_counter()
    left, _, _ = top_singular(matrix, RANK)
    randomised = time.perf_counter() - begun
    best, found = values[:RANK].square().sum(), (left.mT @ matrix).square().sum()
    lost = 1 - float(found / best)
    table = Table(
        PART, f"{WIDTH} x {WIDTH} in fp32, top {RANK}, {settings.device}", ("way", "s", "energy lost")
    )
    table.rows = [("torch.linalg.svd", exact, 0.0), ("randomised", randomised, lost)]
    table.goals = [
        Goal(f"randomised, {WIDTH}: time of torch.linalg.svd", 0.1, randomised / exact, "x"),
        Goal(f"randomised, {WIDTH}: energy lost of the top {RANK}", 0.001, lost),
    ]
    return [table]


def spectrum(width: int) -> torch.Tensor:
    """A random square matrix with singular values 1 / sqrt(1 + i / 32): a few that stand out and a long tail."""
    draw = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(width, width, generator=draw))[0] for _ in range(2)]
    values = (1 + torch.arange(width) / 32).rsqrt()
    return bases[0] * values @ bases[1].mT
