"""Windows of test time (data.drift_windows) as prepare makes them, and the study that reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from dpo4rec_ray.config import Config, read_config
from dpo4rec_ray.config.data import DataSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare.partition_lists import list_number
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.store.reading import without_copies
from dpo4rec_ray.store.schemas import EVALUATED_AT, EVALUATED_METRICS
from dpo4rec_ray.studies import drift
from dpo4rec_ray.studies.study_parts import SeedRuns, by_name, measured
from tests.conftest import local_ray
from tests.raw_data import DAY_S, Event, make_events, ml_1m, ordered, prepared, raw_ids

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def ray_local() -> Iterator[None]:
    with local_ray(2, store_mib=256):
        yield


def windows_of(folder: Path, known: int, **data: Any) -> RunDir:
    """Three windows of test time, so many of them known."""
    values = {"protocol": "time", "test_frac": 0.5, "drift_windows": 3, "known_windows": known}
    return prepared(folder, {**data, **values})


def test_windows_of_time(tmp_path: Path) -> None:
    """Lists of a window are the same however many windows are known; ID@WINDOW has the last events before the window."""
    raw = tmp_path / "raw"
    raw.mkdir()
    events = make_events()
    data = {
        **ml_1m(raw, events),
        "raw_dir": str(raw),
        "protocol": "time",
        "test_frac": 0.5,
        "drift_windows": 3,
    }
    expected = ordered(events, "time")
    late: list[
        list[tuple[int, str, int, list[int], list[float]]]
    ] = []  # time, user, number, candidates, labels
    for known in (0, 1, 2):
        store = windows_of(tmp_path / f"known{known}", known, **data)
        stats = store.require("lists").stats
        starts_s, names = stats["windows_s"], raw_ids(store)
        users = {row["user_id"]: row for row in store.read("users").to_pylist()}
        assert stats["users"] == len(expected) < len(users) == stats["rows_of_users"]
        assert stats["density"] == stats["events"] / (stats["users"] * stats["items"])
        assert list(users) == list(range(len(users))) and len(users) == store.require("users").rows
        found: dict[int, dict[int, tuple[list[int], list[float]]]] = {user: {} for user in users}
        times_s: dict[int, list[int]] = {user: [] for user in users}
        splits: dict[int, set[str]] = {user: set() for user in users}
        for row in store.read("lists").to_pylist():
            user = row["user_id"]
            found[user][row["list_id"] - (user << 20)] = row["candidate_item_ids"], row["labels"]
            times_s[user].append(row["timestamp_s"])
            splits[user].add(row["split"])
            assert (row["split"] == "test") == (row["timestamp_s"] >= starts_s[known])
        own = {users[user]["raw_id"]: user for user in users if user < stats["refreshed_from"]}
        assert sorted(own) == sorted(expected)
        late.append(
            sorted(
                (time_s, raw_id, number, *one)
                for raw_id, user in own.items()
                for time_s, (number, one) in zip(times_s[user], found[user].items(), strict=True)
            )
        )
        again = {
            user: row["raw_id"].rsplit("@", 1) for user, row in users.items() if user not in own.values()
        }
        assert {int(window) for _, window in again.values()} == set(range(known, 3))
        for user, (raw_id, window) in again.items():
            start_s, theirs = starts_s[int(window)], found[own[raw_id]]
            before = [event.item for event in expected[raw_id] if event.timestamp_s < start_s]
            shown = [names[item] for item in users[user]["history_item_ids"]]
            assert shown == before[-6:] and shown
            assert splits[user] == {"test"} and min(times_s[user]) >= start_s
            assert found[user] and all(theirs[number] == one for number, one in found[user].items())
            assert len(found[user]) == sum(time_s >= start_s for time_s in times_s[own[raw_id]])
        known_before = [raw_id for raw_id in expected if expected[raw_id][0].timestamp_s < starts_s[known]]
        assert {raw_id for raw_id, window in again.values() if int(window) == known} <= set(known_before)
    # What was tested with fewer windows known is the same list with more of them.
    for known, window in ((1, 1), (1, 2), (2, 2)):
        since = [[one for one in lists if one[0] >= starts_s[window]] for lists in (late[0], late[known])]
        assert since[0] == since[1] and since[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"drift_windows": 2}, 'drift_windows = 2 needs protocol = "time"'),
        ({"protocol": "time", "drift_windows": 2, "known_windows": 2}, "known_windows = 2 leaves none"),
    ],
)
def test_windows_that_cannot_be(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataSection(**keys)  # pyright: ignore[reportArgumentType]


def evaluated_windows(folder: Path, events: list[Event]) -> SeedRuns:
    """Runs that know 0, 1 and 2 windows, with made figures: texts add .4, less .1 for each window that they are old, and .02
    more with the reranker of each later window.
    """
    raw = folder / "raw"
    raw.mkdir()
    data = {**ml_1m(raw, events), "raw_dir": str(raw)}
    stores = [windows_of(folder / f"known{known}", known, **data) for known in range(3)]
    for known, store in enumerate(stores):
        starts_s, users = store.require("lists").stats["windows_s"], store.read("users")
        names = dict(zip(users["user_id"].to_pylist(), users["raw_id"].to_pylist(), strict=True))
        rows = []
        for one in store.read("lists", split="test").to_pylist():
            window = int(np.searchsorted(starts_s, one["timestamp_s"], side="right")) - 1
            _, copy, written = names[one["user_id"]].rpartition("@")
            hard = list_number(one["list_id"]) % 7 / 100  # the same in all runs
            added = 0.4 - 0.1 * (window - int(written)) + 0.02 * known if copy else 0.9
            for system, value in (("backbone", hard), ("statistics", hard + added)):
                same = {f"{metric}@{k}": value for metric in EVALUATED_METRICS for k in EVALUATED_AT}
                ids = {"list_id": one["list_id"], "user_id": one["user_id"]}
                rows.append({**ids, "system": system, "backbone": "prm", "seed": 0, **same})
        store.start("per_list")
        store.write("per_list", pa.Table.from_pylist(rows))
        stats = {"last_round": 0, "test_lists": "same"}
        store.finish(Manifest(artifact="per_list", fingerprint="x", rows=len(rows), stats=stats))
        recipe = {
            "data": {"drift_windows": 3, "protocol": "time", "known_windows": known},
            "llm": {"source": "statistics"},
        }
        (store.root / "config.json").write_text(Config.model_validate(recipe).model_dump_json())
        (store.root / "summary.json").write_text("{}")
    config = read_config(str(stores[0].root))
    return SeedRuns(0, config, stores[0], {f"cut {known}": stores[known] for known in (1, 2)})


def test_the_study_of_drift_pairs_lists_of_the_same_users(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    stay = [
        replace(event, timestamp_s=1_000_000_000 + int(rng.integers(200 * DAY_S))) for event in make_events()
    ]
    runs = evaluated_windows(tmp_path, stay)
    rows = by_name(drift.rows([runs]))
    expected = {  # what texts add, and against nothing refreshed
        "nothing refreshed, window 0": (0.4, 0.0),
        "nothing refreshed, window 1": (0.3, 0.0),
        "texts refreshed, window 1": (0.4, 0.1),
        "all refreshed, window 1": (0.42, 0.12),
        "nothing refreshed, window 2": (0.2, 0.0),
        "texts refreshed, window 2": (0.4, 0.2),
        "all refreshed, window 2": (0.44, 0.24),
    }
    for name, (added, back) in expected.items():
        assert measured(rows[name], drift.ADDED).interval.mean == pytest.approx(added, abs=1e-5), name
        assert measured(rows[name], drift.BACK).interval.mean == pytest.approx(back, abs=1e-5), name
    assert rows.keys() == expected.keys() | {
        f"{kind} refreshed, all later windows" for kind in ("nothing", "texts", "all")
    }
    lists = {name: row[drift.LISTS] for name, row in rows.items()}
    assert (
        lists["all refreshed, all later windows"]
        == lists["all refreshed, window 1"] + lists["all refreshed, window 2"]
    )
    told = drift.sentence(list(rows.values()))
    assert "texts add +0.4000" in told and "; all +0." in told
    store = runs.recipe
    own = without_copies(store, store.read("per_list").to_pandas())["user_id"]
    assert own.max() < store.require("lists").stats["refreshed_from"] < store.require("users").rows


def test_windows_into_which_nobody_comes_back(tmp_path: Path) -> None:
    """Users stay for 20 of 200 days."""
    with pytest.raises(
        UserError, match=r"no user with events before the cut has a list in window 1, 2; use fewer windows"
    ):
        drift.rows([evaluated_windows(tmp_path, make_events())])
