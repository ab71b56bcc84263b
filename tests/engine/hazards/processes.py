"""Two processes with gloo: what each of them runs, and how to start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import graftwork as gw
from graftwork.errors import StateError
from graftwork.testing import tiny

from .kit import PROJECTIONS, batch, grafted, largest_gap, loss_of

WORLD = 2


def run(worker: Callable[..., None], *args: Any) -> None:
    """Run `worker(rank, *args)` in two processes; an error in one is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_enter, (worker, port, args), nprocs=WORLD, start_method="spawn")


def _enter(rank: int, worker: Callable[..., None], port: int, args: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    try:
        worker(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _techniques() -> dict[str, Any]:
    return {
        "lora": gw.LoRA(rank=4, workspaces=PROJECTIONS),
        "ia3": gw.IA3(workspaces=("attention.key", "attention.value")),
        "bottleneck": gw.BottleneckAdapter(width=4, workspaces=("feedforward",)),
        "fine-tuning": gw.FineTuning(workspaces=("attention.query", "feedforward.down")),
    }


def _rows(rank: int | None, name: str = "llama") -> dict[str, Tensor]:
    whole = batch(name, batch=4)
    return whole if rank is None else {key: value[2 * rank : 2 * rank + 2] for key, value in whole.items()}


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gradients(adapter: gw.Adapter) -> dict[str, Tensor]:
    return {name: _full(parameter.grad).clone() for name, parameter in adapter.named_parameters()}


def _made(
    name: str, dtype: torch.dtype, family: str = "llama", **options: Any
) -> tuple[nn.Module, gw.Adapter]:
    model = tiny(family).to(dtype).train()
    technique = _techniques().get(name) or gw.LoRA(rank=2, workspaces=("ssm.dt", "ssm.out"))
    return model, grafted(model, technique, **options)


def data_parallel(rank: int) -> None:
    """Gradients equal one process, and stay equal over steps; a second, frozen adapter does not disturb."""
    for name in _techniques():
        alone, adapter = _made(name, torch.float32)
        loss_of(alone, _rows(None)).backward()
        wanted = _gradients(adapter)
        model, adapter = _made(name, torch.float32)
        wrapped = DistributedDataParallel(model)
        loss_of(wrapped, _rows(rank)).backward()
        assert largest_gap(_gradients(adapter), wanted) < 1e-6, name
    second = grafted(model, gw.LoRA(rank=2, workspaces=("lm_head",)), "second", verify=False)
    gw.trainable(model, "second")
    gw.active(model, "second")
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1)
    wrapped = DistributedDataParallel(model)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(wrapped, _rows(rank)).backward()
        optimizer.step()
    for tensor in second.tensors().values():
        other = tensor.clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, tensor)
    _idle_but_trainable(rank)
    with _refused("wrap the model in DistributedDataParallel after attach"):
        gw.attach(wrapped, gw.LoRA(rank=2), name="third")
    grafted(wrapped.module, gw.IA3(), "late", verify=False)
    with torch.no_grad():
        wrapped(**_rows(rank))
    with _refused("before attach, so 6 trainable adapter tensors (late: 0/attention.key"):
        wrapped(**_rows(rank))


def _idle_but_trainable(rank: int) -> None:
    """A second trainable adapter that no forward runs: DDP's own search for unused parameters deals with
    it."""
    model, _ = _made("lora", torch.float32, verify=False)
    grafted(model, gw.IA3(), "idle", verify=False)
    gw.trainable(model, "default", "idle")
    gw.active(model, "default")
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):
        loss_of(wrapped, _rows(rank)).backward()


def sharded(rank: int) -> None:
    """fully_shard on each layer and the root, every technique, uniform and mixed precision, against one
    process."""
    for dtype in (torch.float32, torch.bfloat16):
        for name in _techniques():
            alone, adapter = _made(name, dtype)
            optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
            loss_of(alone, _rows(None)).backward()
            wanted = _gradients(adapter)
            optimizer.step()
            model, adapter = _made(name, dtype)
            _shard(model)
            optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
            loss_of(model, _rows(rank)).backward()
            gap = largest_gap(_gradients(adapter), wanted)
            scale = max(float(value.abs().max()) for value in wanted.values())
            assert gap < (1e-5 if dtype == torch.float32 else 0.05) * max(scale, 1.0), (name, dtype, gap)
            assert not any(
                p.requires_grad for key, p in model.named_parameters() if "grafts" not in key.split(".")
            )
            optimizer.step()
            loss_of(model, _rows(rank))
            _check_states(model, optimizer, alone)
    _sharded_variants(rank)


def _shard(model: nn.Module, **options: Any) -> None:
    stack = model.model.layers if hasattr(model, "model") else model.backbone.layers
    for layer in stack:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def _check_states(model: nn.Module, optimizer: torch.optim.Optimizer, alone: nn.Module) -> None:
    options = StateDictOptions(full_state_dict=True)
    whole = get_model_state_dict(model, options=options)
    expected = alone.state_dict()
    if dist.get_rank() == 0:
        assert whole.keys() == expected.keys()
        base = [key for key in expected if "grafts" not in key.split(".")]
        assert all(torch.equal(whole[key], expected[key]) for key in base)
    states = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    assert dist.get_rank() != 0 or (states and all("grafts" in key.split(".") for key in states))


def _sharded_variants(rank: int) -> None:
    """Checkpointing, a bf16 policy, raw reads of Mamba, a site sharded by itself, attach after sharding."""
    for family, name in (("llama", "lora"), ("mamba", "raw reads")):
        alone, adapter = _made(name, torch.float32, family)
        loss_of(alone, _rows(None, family)).backward()
        wanted = _gradients(adapter)
        model, adapter = _made(name, torch.float32, family)
        model.activation_checkpointing_enable({"use_reentrant": False})
        _shard(model)
        loss_of(model, _rows(rank, family)).backward()
        assert largest_gap(_gradients(adapter), wanted) < 1e-5, family

    model, adapter = _made("lora", torch.float32)
    _shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    loss_of(model, _rows(rank)).backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())

    alone, adapter = _made("lora", torch.float32)
    loss_of(alone, _rows(None)).backward()
    wanted = _gradients(adapter)
    model, adapter = _made("lora", torch.float32)
    for layer in model.model.layers:
        fully_shard(layer.self_attn.q_proj)
    _shard(model)
    loss_of(model, _rows(rank)).backward()
    assert largest_gap(_gradients(adapter), wanted) < 1e-5
    with _refused("on top of graftwork's"):
        gw.detach(model)

    model = tiny("llama")
    _shard(model)
    with _refused("call fully_shard after attach"):
        gw.attach(model, gw.LoRA(rank=2))
    model = tiny("llama")
    fully_shard(model.model.layers[0])
    with _refused("sharded already"):
        gw.attach(model, gw.LoRA(rank=2))


class _refused:
    def __init__(self, text: str):
        self.text = text

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        assert kind is StateError, f"expected StateError, got {error!r}"
        assert self.text in str(error), str(error)
        return True
