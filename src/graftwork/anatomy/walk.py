"""Walking a model by its own modules: what an attached adapter added is passed over."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named children of the host itself, without adapter tensors."""
    seated = "_graft" in module.__dict__
    for name, child in module._modules.items():
        if child is not None and not (seated and name == "grafts"):
            yield name, child


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(dotted path, module) of the module and everything below, each module once, parents first."""
    seen: set[int] = set()
    open_ = [(path, module)]
    while open_:
        here, current = open_.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield here, current
        start = f"{here}." if here else ""
        below = [(start + name, child) for name, child in children(current)]
        open_.extend(reversed(below))


def expand(module: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """(path, module) of everything that a path pattern hits; `*` is any one segment, "" the module itself."""
    found = [("", module)]
    for segment in pattern.split(".") if pattern else ():
        found = [(join(path, name), child) for path, m in found for name, child in _matching(m, segment)]
    return found


def join(*parts: str) -> str:
    """A dotted path of its parts, empty ones left out."""
    return ".".join(part for part in parts if part)


def _matching(module: nn.Module, segment: str) -> list[tuple[str, nn.Module]]:
    if segment == "*":
        return list(children(module))
    child = module._modules.get(segment)
    return [] if child is None else [(segment, child)]
