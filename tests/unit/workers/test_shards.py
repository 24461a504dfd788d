from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers.shards import (
    Pool,
    part_number,
    resume_parts,
    run_shards,
    shard_ranges,
)
from tests.conftest import local_ray


def workers() -> tuple[type, type]:
    """Classes made inside a function travel to Ray's workers by value: those cannot import a test module."""

    class Doubler:
        def __init__(self, offset: int):
            self._offset = offset

        def __call__(self, row: dict) -> dict:
            import os

            return {**row, "value": 2 * int(row["low"]) + self._offset, "pid": os.getpid()}

    class Counter:
        def __call__(self, row: dict) -> dict:
            return {**{key: int(row[key]) for key in ("shard", "value", "pid")}, "users": 1}

    return Doubler, Counter


@pytest.fixture(scope="module")
def ray_local() -> Iterator[None]:
    with local_ray(2):
        yield


@pytest.mark.ray
def test_every_shard_goes_through_both_pools_once_and_over_several_actors(ray_local: None) -> None:
    doubler, counter = workers()
    pools = [Pool(doubler, {"offset": 1}, size=2, num_cpus=0.5), Pool(counter, {}, size=1, num_cpus=0.5)]
    shards = [(shard, low, high) for shard, (low, high) in enumerate(shard_ranges(23, 2))]
    answers = list(run_shards(shards, pools, Progress("test", 12, "users")))
    assert sorted(row["shard"] for row in answers) == list(range(12))
    assert {row["shard"]: row["value"] for row in answers} == {shard: 4 * shard + 1 for shard in range(12)}
    assert len({row["pid"] for row in answers}) == 2


@pytest.mark.ray
def test_a_pool_that_can_never_start_is_refused(ray_local: None) -> None:
    pool = Pool(workers()[0], {"offset": 1}, size=5, num_cpus=1)
    with pytest.raises(
        UserError,
        match=r"5 actors of Doubler \(1 CPU each\) cannot.*this machine has 2 CPUs",
    ):
        list(run_shards([(0, 0, 1)], [pool], Progress("test", 1, "users")))


def test_ranges_cover_every_user_once() -> None:
    assert shard_ranges(7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert part_number(Path("some/folder/part-00012.parquet")) == 12


def test_finished_shards_count_only_for_the_same_work(tmp_path: Path) -> None:
    def two_parts() -> None:
        assert resume_parts(tmp_path, "abc") == set()
        for number in (1, 4):
            (tmp_path / f"part-0000{number}.parquet").touch()
        (tmp_path / "part-00005.parquet.tmp7").touch()

    two_parts()
    assert resume_parts(tmp_path, "abc") == {1, 4} and not list(tmp_path.glob("*.tmp*"))
    assert resume_parts(tmp_path, "other") == set() and not list(tmp_path.glob("part-*"))
    two_parts()
    (tmp_path / "manifest.json").write_text("{}")
    assert resume_parts(tmp_path, "abc") == set(), "a complete artifact is redone from the start"
    assert [file.name for file in tmp_path.iterdir()] == ["shards.fingerprint"]


def test_seeds_are_stable_and_differ() -> None:
    assert seed_of(0, "generate", 1, 5) == seed_of(0, "generate", 1, 5)
    assert len({seed_of(0, "generate", 1, user) for user in range(1000)}) == 1000
