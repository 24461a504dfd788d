"""A real S3 server (moto's) with one bucket, for tests of runs without a shared folder."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

BUCKET = "bucket"


def store_environment(address: str) -> dict[str, str]:
    """What every node's processes need to use the server."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextlib.contextmanager
def store_at(address: str) -> Iterator[None]:
    """This process uses the store at `address`; its file systems are kept by fsspec, which does not look at the address."""
    from dpo4rec_ray.storage.object_store import S3

    with pytest.MonkeyPatch.context() as patch:
        for name, value in store_environment(address).items():
            patch.setenv(name, value)
        S3.clear_instance_cache()
        try:
            yield
        finally:
            S3.clear_instance_cache()


@contextlib.contextmanager
def s3_server(host: str = "127.0.0.1", log: Path | None = None) -> Iterator[str]:
    """Address of a server that runs while the block does."""
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(log or os.devnull, "ab"))
        process = subprocess.Popen(command, stdout=out, stderr=out)
        stack.callback(process.wait)
        stack.callback(process.kill)
        address = f"http://{host}:{port}"
        for _ in range(200):
            with contextlib.suppress(requests.ConnectionError):
                requests.put(f"{address}/{BUCKET}", timeout=5).raise_for_status()
                break
            time.sleep(0.1)
        yield address


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def s3(s3_address: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """URI of a folder of the test's own; the environment names its server."""
    with store_at(s3_address):
        yield f"s3://{BUCKET}/{abs(hash(request.node.nodeid)):x}"
