"""One process group for the tests that train."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as the only worker, on gloo."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE="1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
