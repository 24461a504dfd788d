"""A run on a real S3 server, without a shared folder: the same figures as on a disk, resumed, reported, published."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.storage.places import place
from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import DEMO, ROOT, TINY, Finished, command
from tests.same_runs import assert_same_figures

SAME = {"users": 0, "items": 0, "lists": 0, "generations": 1}


@pytest.fixture(scope="module")
def on_s3(s3_address: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of the tiny run's folder."""
    from tests.object_store import BUCKET, store_environment

    with pytest.MonkeyPatch.context() as patch:
        for name, value in store_environment(s3_address).items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("RAY_ADDRESS", "")
        root = f"s3://{BUCKET}/tiny"
        done = run_on(root)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        yield f"{root}/run"


def run_on(root: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = command(DEMO, *TINY, f"run.root={root}", "run.name=run", *arguments)
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=1200)


def test_the_same_rows_and_figures_as_on_a_disk(on_s3: str, tiny_run: Finished) -> None:
    there, here = RunDir(on_s3), RunDir(tiny_run.folder)
    for name, round_id in SAME.items():
        assert there.read(name, round_id).equals(here.read(name, round_id)), name
    pd.testing.assert_frame_equal(
        there.read("scores", 1).to_pandas(), here.read("scores", 1).to_pandas(), atol=1e-5
    )
    assert_same_figures(there, here, within=1e-4)
    assert not list(Path(ROOT).glob("s3:*")), "a folder with the URI's name was made here"


def test_the_same_command_keeps_everything(on_s3: str) -> None:
    done = run_on(on_s3.removesuffix("/run"))
    assert done.returncode == 0 and "evaluate(1): kept" in done.stdout + done.stderr


def test_report_and_log_are_beside_the_run(on_s3: str) -> None:
    names = {file.name for file in place(on_s3).iterdir()}
    assert {"config.json", "summary.json", "report.html", "driver.log"} <= names
    [lease] = (place(on_s3) / ".lease").glob("*")
    assert json.loads(lease.read_text())["ended"] and not list((place(on_s3) / "data").glob("work-*"))


def test_a_run_is_published_into_a_registry_on_the_store(on_s3: str, tmp_path: Path) -> None:
    """And answers from the node's own copy as the evaluation ranked (version_check)."""
    from dpo4rec_ray.cli.serve_actions import publish_run
    from dpo4rec_ray.serving.version_check import load_version

    registry = Registry(f"{on_s3.removesuffix('/run')}/registry")
    card = publish_run(registry, place(on_s3), "one")
    assert [one.version for one in registry.cards()] == ["one"] and card.num_users == 60
    assert registry.promote("one").current == "one" and registry.routing().current == "one"
    assert load_version(registry.folder("one")).files.folder.name == "one"
