"""Pretraining of the small hosts, and the cache that keeps them.

A host is stored at `$GRAFTWORK_CACHE/hosts/NAME-FINGERPRINT` (default `~/.cache/graftwork`): weights,
configuration, tokenizer or image processor, and `metrics.json` with what it learnt. The fingerprint covers
the architecture, this recipe, the Python whose text was read, and the library versions; another one means a
new host. A folder appears whole or not at all: it is written beside and renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.pytorch_utils import Conv1D

from graftwork.errors import BadOption, StateError, UnknownName, nearest
from graftwork.models.hosts import HOSTS, VOCABULARY, Host
from graftwork.models.lessons import Lessons, lessons
from graftwork.tasks.base import IGNORED

RECIPE = 2  # raise when the procedure below, or the embedded data, changes what is learnt
_LIBRARIES = ("torch", "transformers", "tokenizers", "scikit-learn")
_WARMUP = 0.1
_CLIP = 1.0


def cache_folder() -> Path:
    """Where pretrained hosts are kept."""
    return Path(os.environ.get("GRAFTWORK_CACHE", "~/.cache/graftwork")).expanduser() / "hosts"


def host_folder(name: str) -> Path:
    """Where this host belongs with the present versions, whether it exists or not."""
    return cache_folder() / f"{name}-{_fingerprint(_host(name))}"


def cached(name: str, *, make: bool = False) -> Path:
    """The folder of a pretrained host; StateError when there is none, unless it may be made now."""
    folder = host_folder(name)
    if folder.is_dir():
        return folder
    if not make:
        raise StateError(
            f"{name} has not been pretrained yet for these library versions (no {folder}). "
            f"Run `graftwork pretrain {name}` once; it takes a few minutes."
        )
    return pretrain(name)


def pretrain(
    name: str, *, steps: int | None = None, seed: int = 0, progress: bool = True, force: bool = False
) -> Path:
    """Pretrain a small host and put it into the cache; return its folder.

    A host that is there already, with the same steps and seed, is kept unless `force`. The result depends on
    the seed, not on torch's global generator, which is left as it was.
    """
    host = _host(name)
    count = host.steps if steps is None else steps
    if count < 1:
        raise BadOption(f"steps={steps} must be at least 1")
    folder = host_folder(name)
    if not force and _made_with(folder) == (count, seed):
        return folder
    started, worked = time.perf_counter(), time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, material, learnt = _learn(host, count, seed, f"pretraining {name}" if progress else None)
    used = {
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(time.process_time() - worked, 1),
    }
    report = {"host": name, "steps": count, "seed": seed} | used | learnt | {"versions": _versions()}
    with _new_folder(folder) as draft:
        _without_head(model, host).save_pretrained(draft)
        material.preprocessor.save_pretrained(draft)
        (draft / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    return folder


def _learn(host: Host, steps: int, seed: int, title: str | None) -> tuple[Any, Lessons, dict[str, Any]]:
    """The trained model, what it was trained on, and what it knew before and after."""
    material = lessons(host)
    model = getattr(transformers, host.model_class).from_config(host.config())
    before = evaluate(model, material)
    _train(model, material, host, steps, seed, title)
    learnt = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_on": material.size,
        "baseline_loss": material.baseline,
        "before": before,
        "after": evaluate(model, material),
    }
    return model, material, learnt


@torch.no_grad()
def evaluate(model: Any, material: Lessons) -> dict[str, float]:
    """Loss per label (nats) and accuracy on the validation part."""
    model.eval()
    loss = right = total = 0.0
    for batch in material.validation():
        labels = batch["labels"]
        answer = model(**batch)
        shifted = labels.dim() == 2 and not model.config.is_encoder_decoder
        logits, wanted = (answer.logits[:, :-1], labels[:, 1:]) if shifted else (answer.logits, labels)
        counted = (wanted != IGNORED) & (wanted < VOCABULARY)  # span markers are no text
        loss += nn.functional.cross_entropy(logits[counted], wanted[counted], reduction="sum").item()
        right += (logits.argmax(-1) == wanted)[counted].sum().item()
        total += counted.sum().item()
    return {"loss": loss / total, "accuracy": right / total}


def _train(model: nn.Module, material: Lessons, host: Host, steps: int, seed: int, title: str | None) -> None:
    """Linear warm-up, cosine decay to zero, clipped gradients."""
    model.train()
    optimisers = _optimisers(model, host)
    schedules = [LambdaLR(one, partial(_factor, steps=steps)) for one in optimisers]
    rng = random.Random(seed)
    for _ in _steps(steps, title):
        model(**material.batch(rng)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        for one in optimisers:
            one.step()
        for schedule in schedules:
            schedule.step()
        model.zero_grad()


def _optimisers(model: nn.Module, host: Host) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of text hosts, AdamW for the rest.

    With a few hundred steps, orthogonalised updates (Jordan et al. 2024) learn about twice as much per step.
    """
    embeddings = list(
        {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}.values()
    )
    apart = {id(weight) for weight in embeddings}
    matrices = [
        m.weight
        for m in model.modules()
        if isinstance(m, nn.Linear | Conv1D) and id(m.weight) not in apart and host.objective != "images"
    ]
    apart |= {id(weight) for weight in matrices}
    rest = [p for p in model.parameters() if id(p) not in apart]
    adam = torch.optim.AdamW(rest, lr=host.rate, betas=(0.9, 0.95))
    if embeddings:
        adam.add_param_group({"params": embeddings, "lr": host.rate * host.embedding_rate})
    if not matrices:
        return [adam]
    return [adam, torch.optim.Muon(matrices, lr=host.rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]


def _factor(step: int, steps: int) -> float:
    """Share of the highest learning rate at a step."""
    warm = max(1, round(steps * _WARMUP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _steps(count: int, title: str | None) -> Iterator[int]:
    if title is None:
        yield from range(count)
        return
    from rich.progress import track

    yield from track(range(count), description=title)


def _without_head(model: Any, host: Host) -> Any:
    """Image hosts are kept without their classifier, so that no task inherits one by accident."""
    return model.base_model if host.objective == "images" else model


def _host(name: str) -> Host:
    if name not in HOSTS:
        raise UnknownName(f"no small host is called {name!r}. {nearest(name, HOSTS)}")
    return HOSTS[name]


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {library: version(library) for library in _LIBRARIES}


def _fingerprint(host: Host) -> str:
    recipe = {key: value for key, value in host.recipe().items() if key != "steps"}
    content = json.dumps([RECIPE, recipe, _versions()], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _made_with(folder: Path) -> tuple[int, int] | None:
    try:
        report = json.loads((folder / "metrics.json").read_text())
        return report["steps"], report["seed"]
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A draft folder that takes the place of `folder` when the block ends well, and vanishes otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield draft
        _replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replace(draft: Path, folder: Path) -> None:
    retired = draft.with_name(f"{draft.name}-old")
    draft.chmod(0o755)  # mkdtemp makes it private
    with suppress(FileNotFoundError):
        folder.rename(retired)
    draft.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)
