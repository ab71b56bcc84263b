"""`save` and `load`: an adapter from a model to disk and back, in either format."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from graftwork.adapters.format import is_own, read_own, write_own
from graftwork.adapters.hf_peft.folder import CONFIG, PICKLES, TENSORS, read_folder, write_folder
from graftwork.adapters.installing import base_of, install, snapshot, task_of
from graftwork.adapters.names import as_adapter_name, check_file_name
from graftwork.adapters.stored import StoredAdapter
from graftwork.engine.adapter import Adapter
from graftwork.engine.verbs import adapters
from graftwork.errors import BadFile, BadOption, UnknownName, nearest

OWN, HF_PEFT = "graftwork", "hf-peft"
FORMATS = (OWN, HF_PEFT)
SUFFIX = ".safetensors"
IN_RUN = "adapter"  # the folder of a run that holds its adapter


def save(model: nn.Module, folder: str | Path, name: str | None = None, *, format: str = OWN) -> Path:
    """Write an attached adapter, in one step: what was on disk stays whole until the new content is complete.

    Where parameters are sharded (FSDP2) every process calls it, since gathering takes them all; each writes
    the same bytes, and one whole file stays.

    Args:
        folder: made where it does not exist. name: which adapter; not needed when only one is attached.
        format: "graftwork" writes `FOLDER/NAME.safetensors`; "hf-peft" writes HF PEFT's two files into
        `FOLDER/NAME`
            (into `FOLDER` itself for the name "default", as HF PEFT does).

    Returns:
        What `load` and HF PEFT's `from_pretrained` take: the file or the folder.
    """
    check_format_name(format)
    name = check_file_name(_only(model) if name is None else name)
    stored = snapshot(model, name)
    if format == OWN:
        path = Path(folder) / f"{name}{SUFFIX}"
        write_own(path, stored)
    else:
        path = Path(folder) / name if name != "default" else Path(folder)
        write_folder(path, stored, model, getattr(model, "name_or_path", None) or None)
    return path


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    trainable: bool = False,
    allow_other_base: bool = False,
) -> Adapter:
    """Attach an adapter from disk; it becomes active, and frozen unless `trainable`. All or nothing.

    The format is told by content: graftwork's files and HF PEFT's folders.

    Args:
        path: a file, a folder that holds adapters, or a run folder.
        name: which of several in a folder, or another name than the stored one.
        allow_other_base: load although the base is not the one it was trained on; shapes must still fit.

    Raises:
        BadFile: corrupt, incomplete, unsafe or of another format. WrongBase: made for another base.
    """
    stored = read(Path(path), model, name)
    wanted = check_file_name(name if name is not None else stored.manifest.name)
    return install(model, stored, wanted, to_train=trainable, allow_other_base=allow_other_base)


def check_format_name(format: str) -> None:
    """Raise BadOption for a format that does not exist."""
    if format not in FORMATS:
        raise BadOption(f"no format is called {format!r}. {nearest(format, FORMATS)}")


def is_hf_peft(path: Path) -> bool:
    """Whether a folder holds an adapter in HF PEFT's format."""
    return (path / CONFIG).is_file()


def locate(path: Path, name: str | None = None) -> Path:
    """The one adapter meant: a file of ours or a folder of HF PEFT's. BadFile for none, and for several.

    A run folder stands for the adapter that the run has written.
    """
    try:
        present, is_folder = path.exists(), path.is_dir()
    except ValueError as error:
        raise BadFile(f"{str(path)!r} is no path ({error})") from None
    if not present:
        raise BadFile(f"{path} does not exist")
    if not is_folder:
        beside = path.name == TENSORS and is_hf_peft(path.parent) and not is_own(path)
        return path.parent if beside else path
    found = _inside(path) or (_inside(path / IN_RUN) if (path / IN_RUN).is_dir() else [])
    chosen = [entry for entry in found if name is not None and entry.stem == name] or found
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        raise BadFile(
            f"{path} holds several adapters: {', '.join(entry.stem for entry in chosen)}; pass name="
        )
    pickles = [entry.name for entry in path.iterdir() if entry.name in PICKLES]
    raise BadFile(
        f"{path} holds no adapter" + (f", but {pickles[0]}, a pickle, which is never read" if pickles else "")
    )


def _inside(folder: Path) -> list[Path]:
    """Adapters in a folder: itself, its files, its subfolders."""
    itself = [folder] if is_hf_peft(folder) else []
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [e for e in entries if e.suffix == SUFFIX and e.is_file() and not (itself and e.name == TENSORS)]
    return itself + [e for e in files if is_own(e)] + [e for e in entries if is_hf_peft(e)]


def read(path: Path, model: nn.Module, name: str | None = None) -> StoredAdapter:
    """The adapter that `path` (and `name`, of several) means, in either format, in host memory."""
    found = locate(path, name)
    if found.is_dir():
        return read_folder(
            found, model, as_adapter_name(found.resolve().name), base_of(model), task_of(model)
        )
    return read_own(found)


def _only(model: nn.Module) -> str:
    names = list(adapters(model))
    if len(names) != 1:
        raise UnknownName(
            f"name= is needed: this model has {len(names)} adapters ({', '.join(names) or 'none'})"
        )
    return names[0]
