"""transformers' Trainer as it is: columns by signature, train, save, resume, a quantised base's
permission."""

import inspect

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import graftwork as gw

from .kit import PROJECTIONS, batch, grafted, largest_gap, llama, techniques


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        control.should_save = state.global_step >= self.step


def _data() -> Dataset:
    ids = batch(batch=8)["input_ids"].tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "note": ["unused"] * 8})


def _trainer(model, folder, stop: int | None = None, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=0.05,
        **options,
    )
    callbacks = [] if stop is None else [StopAt(stop)]
    return Trainer(model=model, args=arguments, train_dataset=_data(), callbacks=callbacks)


def test_the_signature_stays():
    model = llama()
    before = inspect.signature(model.forward), inspect.signature(type(model).forward)
    gw.attach(model, gw.LoRA(rank=2))
    assert (inspect.signature(model.forward), inspect.signature(type(model).forward)) == before


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_resumed_equals_uninterrupted(name, checkpointing, tmp_path):
    options = {"gradient_checkpointing": checkpointing}
    model = llama()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    whole = grafted(model, techniques()[name])
    _trainer(model, tmp_path / "whole", **options).train()
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.items())

    model = llama()
    grafted(model, techniques()[name])
    _trainer(model, tmp_path / "parts", stop=3, **options).train()
    model = llama()
    resumed = grafted(model, techniques()[name], seed=5)
    _trainer(model, tmp_path / "parts", **options).train(
        resume_from_checkpoint=str(tmp_path / "parts/checkpoint-3")
    )
    assert largest_gap(whole.tensors(), resumed.tensors()) < 1e-6


def test_save_model_holds_every_tensor(tmp_path):
    from safetensors.torch import load_file

    model = llama()
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
    _trainer(model, tmp_path).save_model(tmp_path / "saved")
    kept = load_file(tmp_path / "saved" / "model.safetensors")
    assert sum("grafts" in key.split(".") for key in kept) == len(list(adapter.parameters()))


def test_a_quantised_base_may_be_trained_once_grafted(tmp_path):
    """Trainer refuses "purely quantized" models unless something trainable is on top."""
    model = llama()
    model.is_quantized = True
    model.hf_quantizer = None
    with pytest.raises(ValueError, match="quantized"):
        _trainer(model, tmp_path)
    gw.attach(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
    _trainer(model, tmp_path)
    assert model._hf_peft_config_loaded
    gw.detach(model)
    assert not model._hf_peft_config_loaded


def test_the_flag_is_hidden_while_saving(tmp_path):
    model = llama()
    with gw.active(_grafted(model)):
        pass
    model.is_quantized = True
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "adapter_config.json").exists()


def _grafted(model):
    gw.attach(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
    return model
