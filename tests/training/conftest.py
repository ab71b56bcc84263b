"""The stage on which runs are tested."""

from pathlib import Path

import pytest
from tiny_runs import save_host, save_rows


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `host/`, `train.jsonl`, `dev.jsonl`."""
    folder = tmp_path_factory.mktemp("stage")
    save_host("bert-base", folder / "host")
    save_rows(folder / "train.jsonl", 48, 0)
    save_rows(folder / "dev.jsonl", 24, 1)
    return folder
