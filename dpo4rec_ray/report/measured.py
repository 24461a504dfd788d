"""Rows for the report's charts from a run's artifacts: rewards of held-out users, training steps, spread of rewards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dpo4rec_ray.config.recipe import RunSection
from dpo4rec_ray.evaluation.systems import Row
from dpo4rec_ray.storage.parquet import read_parquet
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.metrics_file import read_metrics

MAX_POINTS = 1000  # of a scatter plot: more hide each other
MAX_STEPS = 300  # of a line: longer trainings are averaged in so many parts
NUM_BINS = 30
# What a step of a training may say of itself -> what it is called; in this order in the report.
STEP_FIGURES = {
    "loss": "loss",
    "accuracy": "accuracy on pairs",
    "margin": "reward margin",
    "gain": "advantage of the policy's texts",
    "kl_per_token": "KL per token, nats",
    "chosen_length": "tokens of the chosen text",
    "rejected_length": "tokens of the rejected text",
    "length": "tokens per text",
    "clip_share": "share of clipped tokens",
    "surprise": "surprise per token, nats",
}


def heldout_rewards(store: RunDir, rounds: Sequence[Row]) -> list[Row]:
    """A row per round and validation user, at most MAX_POINTS of each round: round, before, after."""
    found: list[Row] = []
    for row in rounds:
        table = store.read("heldout", row["policy"], columns=["user_id", "reward_before", "reward_after"])
        frame = table.to_pandas().rename(columns={"reward_before": "before", "reward_after": "after"})
        if len(frame) > MAX_POINTS:
            frame = frame.sample(MAX_POINTS, random_state=0)
        found += frame[["before", "after"]].assign(round=row["round"]).to_dict("records")
    return found


def training_steps(store: RunDir, run: RunSection, rounds: Sequence[Row]) -> list[Row]:
    """A row per step and figure of all trainings: training, step, figure, value, smooth; kind "training" or "held out".

    smooth: mean over a tenth of the steps around, three at least; null for held-out figures.
    """
    found: list[Row] = []
    for row in rounds:
        for turn in range(run.first_turn(row["policy"]), row["policy"] + 1):
            lines = read_metrics(store.path("policy", turn))
            for name in STEP_FIGURES:
                own = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
                held = [
                    (line["step"], line["heldout"][name])
                    for line in lines
                    if line.get("heldout", {}).get(name) is not None
                ]
                about = {"training": run.called(turn), "figure": name}
                found += [
                    {**about, "kind": "training", "step": step, "value": value, "smooth": smooth}
                    for step, value, smooth in _smoothed(own)
                ]
                found += [
                    {**about, "kind": "held out", "step": step, "value": value, "smooth": None}
                    for step, value in held
                ]
    return found


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float, float]]:
    """Step, value and the mean around it; more than MAX_STEPS are averaged in as many parts."""
    if not points:
        return []
    frame = pd.DataFrame(points, columns=["step", "value"]).astype(float)
    if len(frame) > MAX_STEPS:
        frame = frame.groupby(np.arange(len(frame)) * MAX_STEPS // len(frame)).mean()
    window = max(3, len(frame) // 10)
    smooth = frame["value"].rolling(window, center=True, min_periods=1).mean()
    return [
        (round(step), value, mean)
        for step, value, mean in zip(frame["step"], frame["value"], smooth, strict=True)
    ]


def reward_spreads(store: RunDir, turns: dict[int, int]) -> list[Row]:
    """Histogram of the standard deviation of a user's rewards: round, low, high, users. turns: round -> its first turn."""
    spreads = {number: _spreads(store, turn) for number, turn in turns.items()}
    most = max((values.max(initial=0.0) for values in spreads.values()), default=0.0)
    edges = np.linspace(0, most or 1.0, NUM_BINS + 1)
    return [
        {"round": number, "low": low, "high": high, "users": int(users)}
        for number, values in spreads.items()
        for low, high, users in zip(
            edges[:-1].tolist(), edges[1:].tolist(), np.histogram(values, edges)[0], strict=True
        )
    ]


def _spreads(store: RunDir, turn: int) -> np.ndarray:
    """[users] with rewards, part by part: a user's samples are in one part."""
    found = [np.zeros(0)]
    for file in store.files("scores", turn):
        frame = read_parquet(file, columns=["user_id", "reward"]).to_pandas()
        found.append(frame.groupby("user_id")["reward"].std(ddof=0).dropna().to_numpy())
    return np.concatenate(found)
