from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers import shards
from dpo4rec_ray.workers.shards import (
    Pool,
    count_users,
    part_number,
    resume_parts,
    run_shards,
    shard_ranges,
    without,
)
from tests.conftest import local_ray


def workers() -> tuple[type, type]:
    """Classes made inside a function travel to Ray's workers by value: those cannot import a test module."""

    class Doubler:
        def __init__(self, offset: int, folder: str):
            import os
            from pathlib import Path

            self._offset, self._folder = offset, Path(folder)
            (self._folder / str(os.getpid())).touch()

        def __call__(self, row: dict) -> dict:
            import os
            import time

            while (
                len(list(self._folder.iterdir())) < 2
            ):  # the first would be done before the second one has a process
                time.sleep(0.05)
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
def test_every_shard_goes_through_both_pools_once_and_over_several_actors(
    ray_local: None, tmp_path: Path
) -> None:
    doubler, counter = workers()
    pools = [
        Pool(doubler, {"offset": 1, "folder": str(tmp_path)}, size=2, num_cpus=0.5),
        Pool(counter, {}, size=1, num_cpus=0.5),
    ]
    answers = list(run_shards(shard_ranges(23, 2), pools, Progress("test", 12, "users")))
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


@pytest.mark.ray
def test_the_users_mistake_in_a_worker_arrives_as_it_is(ray_local: None) -> None:
    class Refuses:
        def __call__(self, row: dict) -> dict:
            from dpo4rec_ray.errors import UserError

            raise UserError("the key is wrong")

    with pytest.raises(UserError, match="the key is wrong"):
        list(
            run_shards(
                shard_ranges(4, 1), [Pool(Refuses, {}, size=1, num_cpus=1)], Progress("test", 4, "users")
            )
        )


def test_ranges_cover_every_user_once() -> None:
    ranges = shard_ranges(7, 3)
    assert ranges.tolist() == [[0, 0, 3], [1, 3, 6], [2, 6, 7]]
    assert count_users(ranges) == 7 and shard_ranges(0, 3).shape == (0, 3)
    assert without(ranges, {0, 2}).tolist() == [[1, 3, 6]]
    assert without(ranges, {0, 11}, first_part=10).tolist() == [[0, 0, 3], [2, 6, 7]], "part 11 is shard 1"
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


def test_what_a_kill_leaves_of_a_complete_artifact_is_no_unfinished_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe, another one that is killed while it empties the folder, and the first again."""
    resume_parts(tmp_path, "abc")
    for number in range(3):
        (tmp_path / f"part-0000{number}.parquet").touch()
    (tmp_path / "manifest.json").write_text("{}")

    def killed(folder: Path) -> None:
        (folder / "part-00001.parquet").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "remove", killed)
        resume_parts(tmp_path, "other")
    assert resume_parts(tmp_path, "abc") == set()


def test_seeds_are_stable_and_differ() -> None:
    assert seed_of(0, "generate", 1, 5) == seed_of(0, "generate", 1, 5)
    assert len({seed_of(0, "generate", 1, user) for user in range(1000)}) == 1000
