"""The whole run in TensorBoard, MLflow or W&B (run.trackers): each round's figures as its stages finish, and the evaluation's.

One run of a tracker holds them, beside those of the trainings; a run that is continued goes on in it. What was sent is noted by
production in tracking.json: a stage that is kept sends nothing again, one that was run again sends its new figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.evaluation.systems import HEADLINE
from dpo4rec_ray.policy.trackers import TRACKERS
from dpo4rec_ray.stages.evaluate import read_evaluation
from dpo4rec_ray.storage.places import Place, is_remote
from dpo4rec_ray.store.artifacts import Manifest, RunDir, write_json
from dpo4rec_ray.store.dependencies import by_key
from dpo4rec_ray.store.progress import say

SENT_FILE = "tracking.json"
# Figures of the held-out users -> how trackers call them.
HELD_OUT = {
    "reward": "reward",
    "reading": "reading_gain",
    "reading_ndcg": "reading_gain_in_ndcg_at_5",
    "others_reward": "style_gain",
}


class RunTracking:
    """The trackers of a run. A tracker that fails is left out from then on; the run goes on."""

    def __init__(self, config: Config, store: RunDir):
        """Raises UserError: a tracker is not installed, or gives no run."""
        self._store, self._file = store, store.root / SENT_FILE
        settings = by_key(config.model_dump(mode="json"))
        self._trackers = {
            name: TRACKERS[name](store.root, config.run.name, settings) for name in config.run.trackers
        }
        # Tracker -> its run, and which production of each part that run has.
        self._sent: dict[str, dict[str, Any]] = {}
        if self._trackers and self._file.is_file():
            self._sent = json.loads(self._file.read_text(encoding="utf-8"))

    def stage(self, name: str, round_id: int, manifest: Manifest) -> None:
        """Take the figures of a finished stage, if they were not taken before."""
        if self._trackers and name in FIGURES:
            found = {key: value for key, value in FIGURES[name](self._store, manifest) if _known(value)}
            figures = {key: float(value) for key, value in found.items()}
            version = manifest.produced or manifest.fingerprint
            self._once(f"{name}/{round_id}", version, lambda tracker: tracker.add(round_id, figures))

    def links(self, last_round: int) -> None:
        """Take the addresses of the report, the summary and the policies."""
        root = self._store.root
        places = {"report": root / "report.html", "summary": root / "summary.json"}
        for number in range(1, last_round + 1):
            if self._store.manifest("policy", number):
                places[f"policy-{number}"] = self._store.path("policy", number)
        links = {name: _uri(where) for name, where in places.items()}
        self._once("links", json.dumps(links), lambda tracker: tracker.link(links))

    def close(self, *, failed: bool) -> None:
        for tracker in self._trackers.values():
            if not tracker.failure:
                tracker.close(failed=failed)
                self._say_failure(tracker)

    def _once(self, part: str, version: str, send: Callable[[Any], bool]) -> None:
        for name, tracker in self._trackers.items():
            before = self._sent.get(name, {})
            parts: dict[str, str] = before["parts"] if before.get("run") == tracker.run and before else {}
            if tracker.failure or parts.get(part) == version:
                continue
            if send(tracker):
                self._sent[name] = {"run": tracker.run, "parts": parts | {part: version}}
                write_json(self._file, self._sent)
            self._say_failure(tracker)

    def _say_failure(self, tracker: Any) -> None:
        if tracker.failure:
            say(f"  {tracker.failure}")


@contextmanager
def tracked(config: Config, store: RunDir) -> Generator[RunTracking]:
    """The trackers of a run, closed at its end.

    Raises:
        UserError: a tracker is not installed, or gives no run.
    """
    tracking = RunTracking(config, store)
    try:
        yield tracking
    except BaseException:
        tracking.close(failed=True)
        raise
    tracking.close(failed=False)


Figures = Iterator[tuple[str, Any]]  # None and NaN: not known


def _score(store: RunDir, manifest: Manifest) -> Figures:
    stats = manifest.stats
    yield "reward/mean", stats.get("mean_reward")
    yield "reward/spread", stats.get("spread")
    yield "reward/carried_over", stats.get("carried")


def _pair(store: RunDir, manifest: Manifest) -> Figures:
    yield "pairs/train", manifest.stats.get("pairs")
    yield "pairs/heldout", manifest.stats.get("heldout_pairs")


def _validate(store: RunDir, manifest: Manifest) -> Figures:
    stats = manifest.stats
    for name, called in HELD_OUT.items():
        if figure := stats.get("figures", {}).get(name):
            if name == "reward":
                yield "heldout/reward_before", figure["before"]
                yield "heldout/reward_after", figure["after"]
                called = "reward_change"
            yield from _with_ends(f"heldout/{called}", figure["change"], figure["change_ci95"])
    yield "heldout/round_kept", stats.get("choice", {}).get("kept")


def _evaluate(store: RunDir, manifest: Manifest) -> Figures:
    found = read_evaluation(store)
    for row in found["systems"]:
        for metric in HEADLINE:
            yield f"test/{row['backbone']}/{row['system']}/{_plain(metric)}", row[metric]
    for row in found["comparisons"]:
        if row["metric"] in HEADLINE:
            name = f"test/{row['backbone']}/{row['system']}_minus_{row['against']}/{_plain(row['metric'])}"
            yield from _with_ends(name, row["delta"], row["ci95"])


FIGURES: dict[str, Callable[[RunDir, Manifest], Figures]] = {
    "score": _score,
    "pair": _pair,
    "validate": _validate,
    "evaluate": _evaluate,
}


def _with_ends(name: str, value: float, ci95: list[float | None] | None) -> Figures:
    """A value and the ends of its 95 % interval."""
    yield name, value
    low, high = ci95 or (None, None)
    yield f"{name}_low", low
    yield f"{name}_high", high


def _plain(metric: str) -> str:
    """MLflow takes no @ in a name."""
    return metric.replace("@", "_at_")


def _known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _uri(where: Place) -> str:
    return str(where) if is_remote(where) else where.resolve().as_uri()
