"""The cluster of the tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.machine_cluster import Cluster, started


@pytest.fixture(scope="module", params=["shared", "s3"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """What its machines share: a folder, or an S3 server."""
    with started(request.param, tmp_path_factory.mktemp("machines")) as found:
        yield found
