"""One thread, and the same random numbers for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _calm():
    torch.set_num_threads(1)
    torch.manual_seed(0)
