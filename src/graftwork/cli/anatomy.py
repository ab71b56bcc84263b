"""graftwork anatomy MODEL: a model's workspaces, with the modules they are."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from graftwork.reference.site import Site


def anatomy(
    model: Annotated[str, typer.Argument(help="minilm, a small host, a folder or a hub name.")],
    task: Annotated[str | None, typer.Option(help="Task whose head the model gets.")] = None,
) -> None:
    """List the workspaces of a model: where they are, their shapes, and how many."""
    from rich.console import Console
    from rich.table import Table

    from graftwork.anatomy.resolve import all_sites
    from graftwork.cli.skeleton import skeleton

    host = skeleton(model, task)
    groups: dict[tuple[str, str, str], list[Site]] = defaultdict(list)
    for site in all_sites(host):
        groups[_workspace(site), _pattern(site), _shape(site)].append(site)
    table = Table("workspace", "module", "matrix", "count", box=None, header_style="bold")
    for (workspace, module, shape), sites in groups.items():
        table.add_row(workspace, module, shape, str(len(sites)))
    parameters = sum(parameter.numel() for parameter in host.parameters())
    Console().print(table)
    Console().print(
        f"{type(host).__name__}: {parameters:,} parameters, {sum(map(len, groups.values()))} sites"
    )


def _workspace(site: Site) -> str:
    return f"{site.stack}.{site.workspace}" if site.stack else site.workspace


def _pattern(site: Site) -> str:
    """The module with numbers starred, and the parameter or channels where it is not the whole weight."""
    module = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", site.module) or "(the model)"
    bare = f" {site.parameter}" if site.parameter != "weight" else ""
    part = (
        f" channels {site.channels[0]}..{site.channels[-1]}"
        if site.channels and len(site.channels) == 2
        else ""
    )
    read = " (read only)" if site.read_only else ""
    return module + bare + part + read


def _shape(site: Site) -> str:
    if site.weighted:
        return " x ".join(map(str, site.shape))
    return f"{site.channels_in} -> {site.channels_out}" if site.channels_out else ""
