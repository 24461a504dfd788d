from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.texts.attempts import MAX_POISON, MAX_UNFINISHED_STARTS, Attempt, Start, reason_file


def begin(folder: Path, shard: int = 0, job: str = "job", engine: str = "host-1") -> Attempt:
    return Attempt.begin(str(folder), shard, job, engine)


def test_a_finished_shard_leaves_nothing(tmp_path: Path) -> None:
    attempt = begin(tmp_path, 3)
    attempt.enter()
    attempt.end()
    assert not attempt.file.exists()
    assert begin(tmp_path, 3).deaths == 0


def test_two_deaths_alone_make_a_poison(tmp_path: Path) -> None:
    begin(tmp_path).enter()  # with others; then the process is gone
    second = begin(tmp_path)
    assert second.deaths == 1 and not second.alone
    second.enter()  # the whole shard alone
    third = begin(tmp_path)
    assert third.deaths == 2 and not third.is_poison(7)
    third.enter(suspect=7)
    fourth = begin(tmp_path)
    assert fourth.deaths == 2 and not fourth.is_poison(7), "one death alone may be chance"
    fourth.enter(suspect=6)
    fourth.leave()
    fourth.enter(suspect=7)
    fifth = begin(tmp_path)
    assert fifth.is_poison(7) and not fifth.is_poison(6)
    assert not begin(tmp_path, 1).is_poison(7), "shards do not mix"


def test_a_shard_outside_the_engine_is_not_to_blame(tmp_path: Path) -> None:
    begin(tmp_path)  # waits for its turn when another shard's prompt ends the engine
    assert begin(tmp_path).deaths == 0
    third = begin(tmp_path)
    third.enter(suspect=7)
    third.leave()  # between two users
    fourth = begin(tmp_path)
    assert fourth.deaths == 0 and not fourth.alone


def test_deaths_of_another_job_do_not_count(tmp_path: Path) -> None:
    begin(tmp_path).enter(suspect=1)
    again = begin(tmp_path, job="the same command again")
    assert again.deaths == 0 and not again.alone


def test_the_reason_are_those_of_the_engine_that_died(tmp_path: Path) -> None:
    begin(tmp_path, engine="host-1").enter()
    reason_file(str(tmp_path), "host-0").write_text("something of last week")
    assert begin(tmp_path, engine="host-2").reason == ""
    reason_file(str(tmp_path), "host-2").write_text("RuntimeError: out of memory\n")
    assert begin(tmp_path, engine="host-3").reason == "RuntimeError: out of memory"
    assert begin(tmp_path, engine="host-4").reason == "RuntimeError: out of memory", "host-3 left no reason"


def test_many_poisons_in_one_shard_are_none(tmp_path: Path) -> None:
    for user in range(MAX_POISON + 1):
        for _ in range(2):
            begin(tmp_path, 4).enter(suspect=user)
    with pytest.raises(
        UserError, match=rf"engines die at shard 4 with more than {MAX_POISON} of its users, each alone"
    ):
        begin(tmp_path, 4)


def test_engines_that_die_while_they_start_end_the_job(tmp_path: Path) -> None:
    for number in range(20):
        Start(str(tmp_path), "job", f"host-{number}", num_engines=2).done()
    for number in range(2 + MAX_UNFINISHED_STARTS):
        Start(str(tmp_path), "job", f"host-{number}", num_engines=2)
    Start(str(tmp_path), "another job", "host-1", num_engines=2)
    with pytest.raises(UserError, match=r"5 engines ended while they loaded the model"):
        Start(str(tmp_path), "job", "host-99", num_engines=2)


def test_a_torn_file_is_a_fresh_start(tmp_path: Path) -> None:
    attempt = begin(tmp_path)
    attempt.file.write_text('{"deaths": 1, ')
    assert begin(tmp_path).deaths == 0
