from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.stages.attempts import MAX_DEATHS, Attempt, note_of


def test_a_finished_shard_leaves_nothing(tmp_path: Path) -> None:
    attempt = Attempt.begin(str(tmp_path), 3, "job")
    assert attempt.deaths == 0
    attempt.end()
    assert not attempt.file.exists()
    assert Attempt.begin(str(tmp_path), 3, "job").deaths == 0


def test_two_deaths_alone_make_a_poison(tmp_path: Path) -> None:
    Attempt.begin(str(tmp_path), 0, "job")  # all at once; then the process is gone
    second = Attempt.begin(str(tmp_path), 0, "job")
    assert second.deaths == 1 and not second.poison(7)
    second.suspects(7)
    third = Attempt.begin(str(tmp_path), 0, "job")
    assert not third.poison(7), "one death alone may be chance"
    third.suspects(6)
    third.suspects(7)
    fourth = Attempt.begin(str(tmp_path), 0, "job")
    assert fourth.poison(7) and not fourth.poison(6)
    assert not Attempt.begin(str(tmp_path), 1, "job").poison(7), "shards do not mix"


def test_deaths_of_another_job_do_not_count(tmp_path: Path) -> None:
    first = Attempt.begin(str(tmp_path), 0, "job")
    first.suspects(1)
    assert Attempt.begin(str(tmp_path), 0, "the same command again").deaths == 0


def test_a_shard_that_kills_everything_ends_the_job_with_the_last_words(tmp_path: Path) -> None:
    for _ in range(MAX_DEATHS):
        Attempt.begin(str(tmp_path), 0, "job")
    note_of(str(tmp_path), "host-1").write_text("RuntimeError: out of memory\n")
    with pytest.raises(UserError, match=r"died 12 times at shard 0 \(RuntimeError: out of memory\)"):
        Attempt.begin(str(tmp_path), 0, "job")


def test_a_torn_file_is_a_fresh_start(tmp_path: Path) -> None:
    attempt = Attempt.begin(str(tmp_path), 0, "job")
    attempt.file.write_text('{"deaths": 1, ')
    assert Attempt.begin(str(tmp_path), 0, "job").deaths == 0
