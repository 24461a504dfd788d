"""What of a run goes into the report: ranks and marks of texts, the bound on users, and lines that are not too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo4rec_ray.report import text_browser
from dpo4rec_ray.report.measured import MAX_STEPS, _smoothed, reward_spreads
from dpo4rec_ray.store.artifacts import Manifest, RunDir


def text(name: str, reward: float | None, *token_ids: int) -> dict[str, Any]:
    return {"text": name, "reward": reward, "token_ids": list(token_ids)}


def test_texts_are_ranked_and_those_of_pairs_are_marked() -> None:
    samples = [text("c", -2.0, 3), text("a", -1.0, 1), text("b", -2.0, 2), text("no list", None, 4)]
    pair = {"chosen_token_ids": [1], "rejected_token_ids": [[2], [9]]}
    found = text_browser._marked(samples, [pair])
    assert [(one["text"], one["rank"], one["mark"]) for one in found] == [
        ("a", 1, "chosen"),
        ("c", 2, ""),
        ("b", 2, "rejected"),
        ("no list", None, ""),
    ]


def test_texts_without_token_ids_are_in_no_pair() -> None:
    pair = {"chosen_token_ids": [], "rejected_token_ids": [[]]}
    assert text_browser._marked([text("of an endpoint", 1.0)], [pair])[0]["mark"] == ""


def test_users_are_shown_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_browser, "MAX_CHARS", 100)
    users = [{"id": "x" * 40}, {"id": "y" * 40}, {"id": "z"}]
    assert list(text_browser._fitting(iter(users))) == users[:2]
    assert text_browser._cut("a" * 7000).endswith("a …") and len(text_browser._cut("a" * 7000)) == 6002


def test_long_trainings_are_averaged_and_short_ones_are_not() -> None:
    assert [(step, value) for step, value, _ in _smoothed([(1, 0.0), (2, 1.0), (3, 2.0)])] == [
        (1, 0),
        (2, 1),
        (3, 2),
    ]
    assert _smoothed([(1, 0.0), (2, 1.0), (3, 2.0)])[1][2] == 1.0
    long = _smoothed([(step, float(step % 2)) for step in range(5000)])
    assert len(long) == MAX_STEPS and long[0][0] < 10 and long[-1][0] > 4980
    assert all(abs(smooth - 0.5) < 0.05 for _, _, smooth in long) and _smoothed([]) == []


def test_the_histogram_counts_every_user_with_rewards_once(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    store.start("scores", 1)
    users = np.repeat(np.arange(4), 2)
    rewards = np.array([1.0, 1.0, 0.0, 2.0, 0.0, 4.0, np.nan, np.nan], np.float32)
    columns = {
        "round": np.ones(8, np.int32),
        "user_id": users,
        "sample_id": np.tile([0, 1], 4),
        "reward": rewards,
    }
    columns |= dict.fromkeys(("plain_reward", "others_reward", "std_error"), rewards)
    store.write("scores", pa.table(columns | {"num_lists": np.ones(8, np.int32)}), 1)
    store.finish(Manifest("scores", "f", 8), 1)
    rows = reward_spreads(store, {1: 1})
    assert sum(row["users"] for row in rows) == 3
    assert (rows[0]["users"], rows[-1]["users"], rows[-1]["high"]) == (1, 1, 2.0)
