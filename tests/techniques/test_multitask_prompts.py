"""Multitask prompt tuning: its formula, tasks that share a prompt, new tasks, and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from answers import close, logits

import graftwork as gw
from graftwork.errors import BadFile, BadOption, NothingMatches
from graftwork.laws import stir
from graftwork.testing import tiny, tiny_batch

MPT = gw.MultitaskPromptTuning


def module_of(adapter: gw.Adapter) -> Any:
    return next(iter(adapter.modules.values()))


def test_is_a_prompt_times_a_low_rank_matrix() -> None:
    model, batch = tiny("llama"), tiny_batch("llama", padding=False)
    adapter = gw.attach(model, MPT(length=3, rank=2))
    stir(adapter, 1.0)
    module = module_of(adapter)
    prompt = torch.einsum("nc,nr,rc->nc", module.prompt, module.columns, module.rows)
    bare: Any = tiny("llama")
    text = bare.get_input_embeddings()(batch["input_ids"])
    whole = torch.cat([prompt.expand(3, -1, -1), text], 1)
    close(logits(model, **batch), logits(bare, inputs_embeds=whole)[:, 3:])
    assert adapter.count() == 3 * 32 + 2 * (3 + 32)


def test_tasks_trained_together_share_one_tensor() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    first = gw.attach(model, MPT(length=3), name="nli")
    second = gw.attach(model, MPT(length=3, shares="nli"), name="sentiment")
    assert module_of(first).prompt is module_of(second).prompt
    assert module_of(first).rows is not module_of(second).rows
    gw.trainable(model, "nli", "sentiment")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 3 * 32 + 2 * (3 + 32)
    for adapter in (first, second):
        stir(adapter, 0.5)
    alone = []
    for index in (0, 1):
        with gw.route(model, ["nli", "sentiment"], torch.full((3,), index)):
            alone.append(logits(model, **batch))
    with gw.route(model, ["nli", "sentiment"], torch.tensor([0, 1, 0])):
        out = model(**batch).logits
        out.square().mean().backward()
    close(out[1].detach(), alone[1][1])
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("sources", [("a",), ("a", "b")])
@pytest.mark.parametrize("factors", [True, False])
def test_a_new_task_starts_from_trained_ones(sources: tuple[str, ...], factors: bool) -> None:
    model = tiny("llama")
    old = {name: gw.attach(model, MPT(length=3, rank=2), name=name) for name in ("a", "b")}
    for seed, adapter in enumerate(old.values()):
        stir(adapter, seed=seed)
    new = module_of(gw.attach(model, MPT(length=3, rank=2, sources=sources, factors=factors), name="new"))
    known = [module_of(old[name]) for name in sources]
    assert torch.equal(new.prompt, known[0].prompt)
    assert new.prompt is not known[0].prompt
    mean = sum(module.columns for module in known) / len(known)
    assert torch.allclose(new.columns, mean) is factors
    gw.detach(model, "a", "b")


def test_a_file_holds_one_task(tmp_path: Path) -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    gw.attach(model, MPT(length=3), name="nli")
    stir(gw.attach(model, MPT(length=3, shares="nli"), name="sentiment"))
    gw.save(model, tmp_path, name="sentiment")
    fresh = tiny("llama")
    loaded = gw.load(fresh, tmp_path)
    assert loaded.techniques == (MPT(length=3),)
    close(logits(fresh, **batch), logits(model, **batch))


def test_partners_that_do_not_fit_are_named() -> None:
    model = tiny("llama")
    gw.attach(model, gw.PromptTuning(length=3), name="plain")
    gw.attach(model, gw.LoRA(rank=2), name="lora")
    with pytest.raises(NothingMatches, match=r"no adapter called 'nil'.*"):
        gw.attach(model, MPT(shares="nil"), name="x")
    with pytest.raises(NothingMatches, match=r"'lora' has no sequence-port module at embedding"):
        gw.attach(model, MPT(shares="lora"), name="x")
    with pytest.raises(BadOption, match=r"'plain' has no task's prompt of \(3, 32\)"):
        gw.attach(model, MPT(length=3, sources=("plain",)), name="x")
    assert list(gw.adapters(model)) == ["plain", "lora"]


def peft_config(**options: Any) -> peft.MultitaskPromptTuningConfig:
    return peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_ranks=2, prompt_tuning_init="RANDOM", **options
    )


def test_agrees_with_peft_both_ways(tmp_path: Path) -> None:
    batch = tiny_batch("llama", padding=False)
    theirs = peft.get_peft_model(tiny("llama"), peft_config(num_tasks=1)).eval()
    for parameter in theirs.prompt_encoder.parameters():
        parameter.data.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny("llama")
    gw.load(model, tmp_path / "theirs", name="mpt")
    expected = logits(theirs, **batch, task_ids=torch.zeros(3, dtype=torch.long))[:, 3:]
    close(logits(model, **batch), expected)
    gw.save(model, tmp_path / "ours", format="hf-peft")
    again = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours" / "mpt").eval()
    close(logits(again, **batch, task_ids=torch.zeros(3, dtype=torch.long))[:, 3:], expected)


def test_a_file_of_several_tasks_is_refused(tmp_path: Path) -> None:
    peft.get_peft_model(tiny("llama"), peft_config(num_tasks=2)).save_pretrained(tmp_path)
    with pytest.raises(BadFile, match="2 tasks"):
        gw.load(tiny("llama"), tmp_path)
