"""Facts of the machine and the libraries that a figure means nothing without."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def facts(device: str) -> dict[str, object]:
    """Processor or accelerator, threads, load at the start, versions, date."""
    versions = {name: _version(name) for name in _LIBRARIES}
    out: dict[str, object] = {"processor": _processor(), "threads": torch.get_num_threads()}
    if device.startswith("cuda"):
        out["accelerator"] = torch.cuda.get_device_name()
    if hasattr(os, "getloadavg"):
        out["load"] = round(os.getloadavg()[0], 1)
    out["python"] = platform.python_version()
    return {**out, **{k: v for k, v in versions.items() if v}, "date": datetime.date.today().isoformat()}


def _processor() -> str:
    """Its name and how many this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor_name()} x {count}"


def _processor_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
