"""Two processes against one."""

import pytest

from . import processes

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize(
    "worker", [processes.data_parallel, processes.sharded], ids=lambda worker: worker.__name__
)
def test_two_processes_agree_with_one(worker):
    processes.run(worker)
