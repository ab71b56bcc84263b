"""LoRA on convolutions: one to `rank` channels with the host's kernel, stride and padding, then one of 1 x 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftwork as gw
from graftwork.engine.attach import attach
from graftwork.engine.merging import merge, unmerge

RANK, ALPHA = 3, 6
SHAPES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(4, 8, 3), (9, 9)),
    "strided and padded": (nn.Conv2d(4, 8, 3, stride=2, padding=1), (9, 9)),
    "dilated, wide and flat": (nn.Conv2d(4, 8, (1, 5), dilation=(1, 2), padding=(0, 4)), (5, 12)),
    "of one dimension": (nn.Conv1d(4, 8, 5, stride=3), (17,)),
    "of three dimensions": (nn.Conv3d(4, 8, 2), (4, 4, 4)),
    "of one place": (nn.Conv2d(4, 8, 1), (5, 5)),
}


class Host(nn.Module):
    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.body = convolution

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def made(case: str) -> tuple[Host, Tensor, Any]:
    """A host with a trained LoRA on it, its input, and the module."""
    torch.manual_seed(0)
    host, size = SHAPES[case]
    kind: Any = type(host)
    copy = kind(**{name: getattr(host, name) for name in ARGUMENTS})
    model = Host(copy.double())
    adapter = attach(model, gw.LoRA(rank=RANK, alpha=ALPHA, workspaces=("re:body",)), name="fr")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return model, torch.randn(2, 4, *size, dtype=torch.float64), adapter.placed[0].graft.module


ARGUMENTS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")


def pair(host: Any, module: Any) -> nn.Sequential:
    """The two convolutions, written with torch's own."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(host.kernel_size)]
    geometry = {name: getattr(host, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    first: Any = kind(4, RANK, bias=False, **geometry).double()
    second: Any = kind(RANK, 8, 1, bias=False).double()
    first.weight.data = module.down.detach().view(first.weight.shape)
    second.weight.data = module.up.detach().view(second.weight.shape)
    return nn.Sequential(first, second)


@pytest.mark.parametrize("case", SHAPES)
def test_lora_adds_a_pair_of_thin_convolutions(case: str) -> None:
    model, x, module = made(case)
    host: Any = model.body
    with gw.active(model):
        bare = model(x)
    torch.testing.assert_close(model(x), bare + ALPHA / RANK * pair(host, module)(x))
    kernel = torch.Size(host.kernel_size).numel()
    assert sum(p.numel() for p in module.parameters()) == RANK * (4 * kernel + 8)


@pytest.mark.parametrize("case", SHAPES)
def test_check_7_the_rank_across_channels_and_kernel_and_merging(case: str) -> None:
    model, x, _ = made(case)
    host: Any = model.body
    weight, wanted = host.weight.detach().clone(), model(x)
    merge(model, "fr")
    torch.testing.assert_close(model(x), wanted)
    change = (host.weight - weight).flatten(2)  # (out, in, kernel)
    height = host.kernel_size[0]
    rows = change.unflatten(2, (height, -1)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    assert int(torch.linalg.matrix_rank(rows, rtol=1e-9)) <= RANK * height
    unmerge(model)
    assert torch.equal(host.weight, weight)
