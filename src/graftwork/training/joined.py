"""The connector of a model made of two bases: neither base has it, so the run trains it in its place and keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from graftwork.adapters.disk import write_atomically
from graftwork.errors import BadFile
from graftwork.models.captioner import Captioner, Connector
from graftwork.training.states import whole


def connector_of(model: nn.Module) -> Connector:
    """What `load_pair` put between the two."""
    return cast(Captioner, model).connector


def save_connector(model: nn.Module, file: Path) -> None:
    """Write it; where it is sharded every process calls this."""
    content = save({name: whole(tensor) for name, tensor in connector_of(model).state_dict().items()})

    def write(out: BinaryIO) -> None:
        out.write(content)

    write_atomically(file, write)


def load_connector(model: nn.Module, file: Path) -> None:
    """Put back what `save_connector` wrote. Raises BadFile where the file is damaged or of other bases."""
    connector = connector_of(model)
    try:
        given: dict[str, Tensor] = load_file(file)
        connector.load_state_dict(given)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BadFile(f"{file} is no connector of this model: {error}") from None
