"""Run folders of variants: what is lent, and that the lender is never changed."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from dpo4rec_ray.config import load_config
from dpo4rec_ray.running import is_finished
from dpo4rec_ray.store.artifacts import RunDir, write_json
from dpo4rec_ray.studies.variants import kept_and_redone, lend, seconds
from tests.unit.test_dry_run import finish


@pytest.fixture
def base(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "base")
    finish(load_config("demo"), found)
    write_json(found.root / "config.json", {})
    write_json(found.root / "summary.json", {})
    found.write("truth", pa.table({"user_id": [1], "tastes": [["jazz"]]}))
    return found


def files(store: RunDir) -> dict[str, bytes]:
    return {
        file.relative_to(store.root).as_posix(): file.read_bytes()
        for file in store.root.rglob("*")
        if file.is_file()
    }


def test_every_complete_artifact_is_lent_and_no_other_file(base: RunDir, tmp_path: Path) -> None:
    (base.path("pairs", 1) / "manifest.json").unlink()  # not complete
    variant = RunDir(tmp_path / "variant")
    lend(base, variant)
    lent, whole = files(variant), files(base)
    left = {name for name in whole if name.startswith("rounds/01/pairs")} | {"config.json", "summary.json"}
    assert lent == {name: content for name, content in whole.items() if name not in left}
    one = "data/truth/part-00000.parquet"
    assert (variant.root / one).stat().st_ino == (base.root / one).stat().st_ino, "linked, not copied"


def test_what_the_variant_writes_does_not_reach_the_lender(base: RunDir, tmp_path: Path) -> None:
    variant, before = RunDir(tmp_path / "variant"), files(base)
    lend(base, variant)
    variant.write("truth", pa.table({"user_id": [2], "tastes": [["rock"]]}))  # in place of the linked part
    assert files(base) == before
    finish(load_config("demo", ["dpo.beta=0.3"]), variant)  # every folder made anew
    variant.write("truth", pa.table({"user_id": [2], "tastes": [["rock"]]}))
    assert files(base) == before
    assert variant.read("truth")["user_id"].to_pylist() == [2] != base.read("truth")["user_id"].to_pylist()


def test_lending_goes_on_until_the_variant_runs(base: RunDir, tmp_path: Path) -> None:
    """Killed while it was lent to, it gets the rest; once it runs, what it has left unfinished stays."""
    variant = RunDir(tmp_path / "variant")
    lend(base, variant)
    (variant.path("policy", 1) / "manifest.json").unlink()
    lend(base, variant)
    assert variant.manifest("policy", 1)
    write_json(variant.root / "config.json", {})
    (variant.path("policy", 1) / "manifest.json").unlink()
    lend(base, variant)
    assert variant.manifest("policy", 1) is None


def test_a_lent_run_is_finished_and_a_changed_key_redoes_what_depends_on_it(
    base: RunDir, tmp_path: Path
) -> None:
    variant, config = RunDir(tmp_path / "variant"), load_config("demo", ["dpo.beta=0.3"])
    lend(base, variant)
    write_json(variant.root / "summary.json", {})
    assert is_finished(load_config("demo"), variant) and not is_finished(config, variant)
    for name in ("policy", "knowledge", "heldout"):
        manifest = variant.require(name, 1)
        manifest.produced, manifest.seconds = "anew", 2.0
        variant.finish(manifest, 1)
    (variant.path("per_list") / "manifest.json").unlink()
    redone = {"dpo(1)": "redone", "encode(1)": "redone", "validate(1)": "redone", "evaluate(1)": ""}
    found = kept_and_redone(config, base, variant)
    assert found == dict.fromkeys(found, "kept") | redone
    assert seconds(config, variant) == 6.0
