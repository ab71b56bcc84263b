"""OFT, BOFT and HRA in HF PEFT's format: the same answers in both libraries, in both directions."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
from peft_hosts import host, made_by_peft
from peft_trips import (
    options_on_the_page,
    read_by_peft_and_here,
    read_here_and_written_again,
    refused_to_write,
)

from graftwork.adapters.hf_peft import boft, hra, oft
from graftwork.adapters.store import load
from graftwork.errors import BadFile
from graftwork.reference.technique import Technique
from graftwork.techniques.boft import BOFT
from graftwork.techniques.fine_tuning import FineTuning
from graftwork.techniques.hra import HRA
from graftwork.techniques.oft import OFT
from pages import ROOT

LIST = ["q_proj", "down_proj"]

MADE_BY_PEFT: dict[str, tuple[str, peft.PeftConfig]] = {
    "oft, series": ("llama", peft.OFTConfig(oft_block_size=4, target_modules=LIST)),
    "oft, three terms": (
        "llama",
        peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, target_modules=LIST),
    ),
    "oft, exact": ("llama", peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=LIST)),
    "oft, one block": (
        "llama",
        peft.OFTConfig(oft_block_size=8, block_share=True, use_cayley_neumann=False, target_modules=LIST),
    ),
    "oft, number of blocks": ("llama", peft.OFTConfig(r=4, oft_block_size=0, target_modules=LIST)),
    "oft and head": (
        "bert-classifier",
        peft.OFTConfig(task_type="SEQ_CLS", oft_block_size=4, target_modules=["query", "value"]),
    ),
    "oft, some layers": (
        "llama",
        peft.OFTConfig(oft_block_size=4, target_modules=["v_proj"], layers_to_transform=[0, 2]),
    ),
    "boft": ("llama", peft.BOFTConfig(boft_block_size=4, target_modules=LIST)),
    "boft, number of blocks": (
        "llama",
        peft.BOFTConfig(boft_block_size=0, boft_block_num=2, target_modules=["q_proj"]),
    ),
    "boft and head": (
        "bert-classifier",
        peft.BOFTConfig(task_type="SEQ_CLS", boft_block_size=4, target_modules=["query"]),
    ),
    "hra": ("llama", peft.HRAConfig(r=4, target_modules=LIST)),
    "hra and head": ("bert-classifier", peft.HRAConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])),
}


@pytest.fixture(autouse=True)
def _no_extension() -> object:
    """peft warns that the CUDA extension of BOFT is missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(CUDA extension|butterfly_factor).*")
        peft.tuners.boft.layer.get_fbd_cuda()
        yield


@pytest.mark.parametrize("case", MADE_BY_PEFT)
def test_made_by_peft_read_here_and_written_again(case: str, tmp_path: Path) -> None:
    read_here_and_written_again(*MADE_BY_PEFT[case], tmp_path)


MADE_HERE: dict[str, tuple[str, tuple[Technique, ...]]] = {
    "oft": ("llama", (OFT(block=4),)),
    "oft, series, one block": ("llama", (OFT(block=8, terms=6, one_block=True),)),
    "oft and a whole layer": (
        "llama",
        (OFT(block=4), FineTuning(workspaces=("feedforward.up",), layers=(1,))),
    ),
    "boft and head": ("bert-classifier", (BOFT(block=4),)),
    "hra": ("llama", (HRA(rank=6),)),
}


@pytest.mark.parametrize("case", MADE_HERE)
def test_made_here_read_by_peft(case: str, tmp_path: Path) -> None:
    read_by_peft_and_here(*MADE_HERE[case], tmp_path)


REFUSED_TO_WRITE: dict[str, tuple[str, tuple[Technique, ...], str]] = {
    "short series": ("llama", (OFT(block=4, terms=3),), "no series of 3 terms"),
    "two sizes": (
        "llama",
        (OFT(block=4, workspaces=("attention.query",)), OFT(block=8, workspaces=("attention.value",))),
        "one block size for all of an adapter",
    ),
    "boft series": ("llama", (BOFT(terms=5),), "exact rotation only"),
    "parts": (
        "gpt2",
        (OFT(block=4, workspaces=("attention.query",)),),
        "no place for a part of a fused projection",
    ),
    "convolution": ("resnet", (HRA(workspaces=("conv",)),), "no place for a convolution"),
    "Conv1D": ("gpt2", (HRA(workspaces=("feedforward.up",)),), "no place for a Conv1D"),
}


@pytest.mark.parametrize("case", REFUSED_TO_WRITE)
def test_what_peft_cannot_hold_is_refused(case: str, tmp_path: Path) -> None:
    refused_to_write(*REFUSED_TO_WRITE[case], tmp_path)


REFUSED_TO_READ: dict[str, tuple[str, peft.PeftConfig, str]] = {
    "constrained": (
        "llama",
        peft.OFTConfig(oft_block_size=4, coft=True, target_modules=LIST),
        "cut to a distance",
    ),
    "two terms": (
        "llama",
        peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=2, target_modules=LIST),
        "no series of a rotation",
    ),
    "orthogonal": (
        "llama",
        peft.HRAConfig(r=2, apply_GS=True, target_modules=LIST),
        "orthogonal to one another",
    ),
    "odd": ("llama", peft.HRAConfig(r=3, target_modules=LIST), "even number of reflections"),
    "convolution": ("resnet", peft.HRAConfig(r=2, target_modules=["convolution"]), "no linear layer"),
}


@pytest.mark.parametrize("case", REFUSED_TO_READ)
def test_what_has_no_counterpart_is_refused(case: str, tmp_path: Path) -> None:
    name, config, text = REFUSED_TO_READ[case]
    made_by_peft(name, config, tmp_path)
    with pytest.raises(BadFile, match=text):
        load(host(name), tmp_path)


def test_a_series_of_another_time_is_refused(tmp_path: Path) -> None:
    made_by_peft("llama", MADE_BY_PEFT["oft, series"][1], tmp_path)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(document | {"peft_version": "0.17.1"}))
    with pytest.raises(BadFile, match=r"before 0\.18"):
        load(host("llama"), tmp_path)


def test_the_page_names_the_options() -> None:
    options_on_the_page({"OFT": oft, "BOFT": boft})
    page = (ROOT / "docs" / "hf-peft.md").read_text()
    assert all(f"`{name}`" in page for name in (*oft.REFUSED, *hra.REFUSED))
