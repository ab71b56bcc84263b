"""A model's workspaces as a table: which modules, how many, what shape, how many parameters."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rich import box
from rich.table import Table
from torch import nn

from graftwork.anatomy.anatomy import Anatomy
from graftwork.anatomy.resolve import anatomy_of
from graftwork.anatomy.sites import BARE, block_sites, sites_at
from graftwork.anatomy.survey import survey
from graftwork.reference.properties import Port
from graftwork.reference.site import Side, Site


@dataclass(frozen=True, kw_only=True)
class Row:
    """One workspace, at modules of one name and shape.

    Attributes:
        workspace: with its stack in front, where the model has several.
        layer: name of the layers, `*` for numbers (`model.layers.*`); empty outside layers.
        modules: name of the modules, within the layer where there is one (`mlp.up_proj`).
        count: number of modules.
        shape: of one weight, (out, in) whatever the storage; the width of the signal at a block or inner
            activation.
        parameters: of all of them, weights and biases; 0 for a place that stands for no weight of its own and
            for a part of a fused projection.
        kind: of the module, or `block`, `input` (what the module reads), `part` (of a fused projection).
        called: False where the host reads the weight and never calls the module.
    """

    workspace: str
    layer: str
    modules: str
    count: int
    shape: tuple[int, ...]
    parameters: int
    kind: str
    called: bool


def anatomy_table(model: nn.Module) -> list[Row]:
    """The rows of a model, weights first; works on the meta device."""
    found = survey(model, anatomy_of(model))
    paths = {(run.stack.name, layer.number): layer.path for run in found.runs for layer in run.layers}
    groups: dict[Row, list[Site]] = {}
    for site in [*sites_at(found, Port.WEIGHT), *block_sites(found)]:
        path = "" if site.layer is None else paths[site.stack, site.layer]
        groups.setdefault(_row(site, path), []).append(site)
    return [_counted(row, sites) for row, sites in groups.items()]


def render_anatomy(model: nn.Module) -> Table:
    """The table for a terminal, layer by layer kind, with the ports that the model refuses below it."""
    total = sum(p.numel() for p in model.parameters())
    table = Table(
        title=f"{type(model).__name__}, {total:,} parameters",
        caption=_refused(anatomy_of(model)) or None,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("workspace", no_wrap=True)
    table.add_column("modules", overflow="fold")
    for heading in ("count", "shape", "parameters"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    layer = ""
    for row in sorted(anatomy_table(model), key=lambda row: (row.layer != "", row.layer)):
        if row.layer != layer:
            layer = row.layer
            table.add_section()
            table.add_row("", f"[bold]{layer}[/bold]")
        table.add_row(*_cells(row))
    return table


def refusals(anatomy: Anatomy) -> dict[Port, str]:
    """Port -> why every stack of the model refuses it; ports that some stack grants are left out."""
    reasons = {
        Port.ATTENTION: [s.attention_reason for s in anatomy.stacks],
        Port.SEQUENCE: ["" if s.sequence else s.sequence_reason for s in anatomy.stacks],
    }
    return {port: texts[0] for port, texts in reasons.items() if texts and all(texts)}


def _row(site: Site, layer: str) -> Row:
    """The row that a site belongs to, not yet counted."""
    inside = site.module[len(layer) :].lstrip(".") if layer else site.module
    name = inside if site.parameter == "weight" else f"{inside}.{site.parameter}"
    return Row(
        workspace=f"{site.stack}.{site.workspace}" if site.stack else site.workspace,
        layer=_template(layer),
        modules=_template(name.lstrip(".")),
        count=0,
        shape=site.shape if site.weighted else (site.width,),
        parameters=0,
        kind=_kind(site),
        called=not site.read_only and site.kind not in BARE,
    )


def _counted(row: Row, sites: list[Site]) -> Row:
    own = [s for s in sites if s.weighted and s.channels is None]
    total = sum(math.prod(s.shape) + (s.width_out if s.has_bias else 0) for s in own)
    return Row(**{**row.__dict__, "count": len(sites), "parameters": total})


def _template(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _kind(site: Site) -> str:
    if site.side is Side.INPUT:
        return "input"
    if site.entry is not None:
        return "block"
    return "part" if site.channels is not None else site.kind.value


def _cells(row: Row) -> tuple[str, ...]:
    shape = " x ".join(map(str, row.shape))
    own = f"{row.parameters:,}" if row.parameters else ""
    name = f".{row.modules}" if row.layer and row.modules else row.modules
    return row.workspace, name, str(row.count), shape, own, row.kind if row.called else f"{row.kind} (read)"


def _refused(anatomy: Anatomy) -> str:
    return "\n".join(f"no {port.value} port: {reason}" for port, reason in refusals(anatomy).items())
