"""Start and work of finished stages, told apart by clocks inside of them, or by two runs."""

from __future__ import annotations

from typing import Any

import pytest

from dpo4rec_ray.planning.rates import Measured, Rate, measured, rate_of
from dpo4rec_ray.store.artifacts import Manifest


def manifest(seconds: float, *timings: dict[str, Any], **stats: Any) -> Manifest:
    return Manifest("x", "", 1, seconds=seconds, stats=stats, timings=list(timings))


def timing(units: int, first_s: float, first_units: int, last_s: float, **more: Any) -> dict[str, Any]:
    own = {"label": "score", "unit": "users", "seconds": last_s + 1, "units": units}
    return {**own, "first_s": first_s, "first_units": first_units, "last_s": last_s, **more}


def test_results_behind_the_first_tell_the_rate() -> None:
    """90 of 100 users in 18 s: 20 s of work, so 12 of 32 s were the start."""
    found = measured(manifest(32.0, timing(100, 12.0, 10, 30.0)), share=100)
    assert found == Measured(100, 32.0, pytest.approx(12.0))
    rate = rate_of([found])
    assert rate == Rate(pytest.approx(12.0), pytest.approx(5.0)) and rate.seconds(1_000) == pytest.approx(
        212.0
    )


def test_an_engines_own_clock_counts_where_shards_end_together() -> None:
    engines = {"a": {"span_s": 8.0}, "b": {"span_s": 7.0}}
    found = measured(manifest(20.0, timing(100, 18.0, 60, 19.0), this_run={"engines": engines}), 1)
    assert found.start_s == pytest.approx(12.0)


def test_what_does_not_grow_with_users_is_start() -> None:
    items = timing(320, 6.0, 320, 6.0, label="encode items", unit="items")
    found = measured(manifest(30.0, items, timing(100, 10.0, 50, 15.0)), 1)
    assert found.start_s == pytest.approx(20.0)


def test_what_is_measured_behind_the_epochs_grows_with_lists() -> None:
    """Epochs: 30 in 15 s; 5 s behind the last one are not start."""
    found = measured(manifest(30.0, timing(30, 10.0, 0, 25.0, unit="epochs")), 1)
    assert found.start_s == pytest.approx(10.0)


def test_a_stage_that_says_its_work() -> None:
    assert measured(manifest(8.0, work_s=2.0), 1).start_s == 6.0


def test_a_first_result_that_is_all_was_the_start() -> None:
    """One block of raw data: its worker starts in 18 s and reads it in no time; what follows it is work."""
    block = timing(18_064, 18.0, 18_064, 18.0, label="prepare: reading", unit="rows")
    partition = timing(1, 0.1, 1, 0.1, label="prepare: sorting", unit="partitions", seconds=0.3)
    assert measured(manifest(20.0, block, partition), 1).start_s == pytest.approx(19.7)


def test_nothing_known_counts_as_work() -> None:
    assert measured(manifest(8.0), 1).start_s == 0.0
    assert measured(manifest(8.0, timing(4, 7.0, 4, 7.0)), 1).start_s == 0.0  # a single result


def test_two_runs_need_no_clock() -> None:
    rate = rate_of([Measured(100, 20.0, 0.0), Measured(1_000, 110.0, 0.0)])
    assert rate == Rate(pytest.approx(10.0), pytest.approx(10.0))


def test_two_runs_whose_line_has_no_start_fall_back_to_the_larger() -> None:
    rate = rate_of([Measured(100, 5.0, 0.0), Measured(1_000, 110.0, 10.0)])
    assert rate == Rate(pytest.approx(10.0), pytest.approx(10.0))


def test_nothing_measured() -> None:
    assert rate_of([]) is None
    assert rate_of([Measured(100, 0.0, 0.0)]) is None
