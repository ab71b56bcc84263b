"""The printed table."""

import io

import pytest
import torch
from hosts import ALL, host
from rich.console import Console

from graftwork.anatomy.describe import anatomy_table, refusals, render_anatomy
from graftwork.anatomy.resolve import anatomy_of
from graftwork.reference.properties import Port
from graftwork.testing import tiny


def printed(model, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(render_anatomy(model))
    return console.file.getvalue()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bart", "convnext"])
def test_parameters_add_up(name):
    model = host(name)
    inside = sum(row.parameters for row in anatomy_table(model) if row.layer)
    assert inside == sum(
        p.numel() for n, p in model.named_parameters() if any(f".{k}." in n for k in ("layers", "h"))
    )


def test_rows_of_a_fused_projection():
    rows = {row.workspace: row for row in anatomy_table(host("gpt2"))}
    whole, part = rows["attention.qkv"], rows["attention.query"]
    assert (whole.modules, whole.layer, whole.count) == ("attn.c_attn", "transformer.h.*", 2)
    assert (whole.shape, whole.parameters, whole.kind) == ((96, 32), 2 * (96 * 32 + 96), "linear")
    assert (part.shape, part.parameters, part.kind) == ((32, 32), 0, "part")


@pytest.mark.parametrize("name", ALL)
def test_printing(name):
    text = printed(host(name))
    assert type(host(name)).__name__ in text
    assert all(row.workspace in text for row in anatomy_table(host(name)))


def test_a_model_without_weights_in_memory():
    with torch.device("meta"):
        model = tiny("llama")
    assert printed(model) == printed(host("llama"))


def test_refusals():
    assert set(refusals(anatomy_of(host("swin")))) == {Port.SEQUENCE}
    assert set(refusals(anatomy_of(host("mamba")))) == {Port.ATTENTION}
    assert refusals(anatomy_of(host("t5"))) == {}
    assert "no attention port: Mamba has no attention" in printed(host("mamba"))
