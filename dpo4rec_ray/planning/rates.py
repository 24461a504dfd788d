"""How fast a stage was in finished runs: seconds until it worked, and seconds per unit of one worker's work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo4rec_ray.store.artifacts import Manifest

NOT_OF_USERS = ("engines", "encode items")  # labels of what does not grow with the users: it counts as start


@dataclass(frozen=True)
class Rate:
    """Of a stage. start_s: start of workers, models to load; per_s: units per second of one worker."""

    start_s: float
    per_s: float

    def seconds(self, share: float) -> float:
        """For so many units of each worker."""
        return self.start_s + share / self.per_s


@dataclass(frozen=True)
class Measured:
    """One finished stage: units of each worker, seconds of the stage, and those of them that do not grow with the units."""

    share: float
    seconds: float
    start_s: float


def measured(manifest: Manifest, share: float) -> Measured:
    """Tell a stage's start from its work, from what its manifest says.

    An engine knows by its own clock for how long it has worked. Other workers are known by their results: those behind the first
    one tell the rate, and with it the time of all. Where the first kind of result comes all at once, as with a single block of
    raw data, its time is that of the start. Without any of these nothing is taken for the start.
    """
    engines = manifest.stats.get("this_run", {}).get("engines", {})
    by_clock = max((one["span_s"] for one in engines.values()), default=0.0)
    timings = [one for one in manifest.timings if one["label"] not in NOT_OF_USERS]
    at_once = bool(timings) and timings[0]["units"] == timings[0]["first_units"]
    work = max(by_clock, sum(map(_work_s, timings[at_once:])))
    if timings and timings[-1]["unit"] == "epochs":  # then the driver measures what was fitted, on all lists
        work += max(0.0, manifest.seconds - timings[-1]["last_s"])
    work = manifest.stats.get("work_s", work) or manifest.seconds
    return Measured(share, manifest.seconds, max(0.0, manifest.seconds - work))


def _work_s(timing: Mapping[str, Any]) -> float:
    """Seconds that all of a Progress's units take at the rate of those behind the first result."""
    behind = timing["units"] - timing["first_units"]
    if behind <= 0:  # a single result: how much of its time was the start is not known
        return timing["seconds"]
    return (timing["last_s"] - timing["first_s"]) * timing["units"] / behind


def rate_of(points: Sequence[Measured]) -> Rate | None:
    """The rate that one run shows, or several of different size together; None where there is nothing to tell it from.

    Several runs need no clock inside of a stage: the line through their seconds over their units is start and rate.
    """
    points = [one for one in points if one.share > 0 and one.seconds > 0]
    if not points:
        return None
    shares, seconds = (np.array([getattr(one, name) for one in points]) for name in ("share", "seconds"))
    if shares.max() > 1.5 * shares.min():
        slope, start = np.polyfit(shares, seconds, 1, w=1 / seconds)
        if slope > 0 and start >= 0:
            return Rate(float(start), float(1 / slope))
    best = max(points, key=lambda one: one.share)
    start = min(best.start_s, best.seconds * 0.99)
    return Rate(start, best.share / (best.seconds - start))
