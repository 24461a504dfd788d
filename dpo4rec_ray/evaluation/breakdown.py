"""The headline metrics broken down by length of history, number of lists and popularity."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from dpo4rec_ray.core.intervals import Interval
from dpo4rec_ray.evaluation.per_list import Array, PerList, interval_stats
from dpo4rec_ray.evaluation.systems import BACKBONE, HEADLINE, Row, System, compared_pairs

NUM_BUCKETS = 3


def breakdown(per_list: pd.DataFrame, about: pd.DataFrame, num_resamples: int) -> list[Row]:
    """HEADLINE of every system by length of the user's history, by the user's number of lists, and by popularity.

    The buckets are thirds of the users; for popularity they are thirds of the lists. The knowledge history is capped, so it
    separates users with few events; the number of lists separates users with many.

    about: list_id, history_length (events of the user's knowledge history) and popularity (mean training positives per
    positive item of the list; NaN for a list without a positive: those are left out there). A row has "by", "bucket" (the
    range of its lists, e.g. "8-15"), "lists", "users", "seeds", means over lists and seeds, and "<metric> delta" and
    "<metric> ci95" against the backbone as in `tables.comparisons` (None for the backbone itself and without a backbone).
    Equal values stay in one bucket, so there may be fewer than three.

    Raises:
        ValueError: as `tables.comparisons`, or `about` misses a list, has it twice, or a history_length is NaN.
    """
    lists = PerList.of(per_list, HEADLINE)
    known = about.set_index("list_id")
    if not known.index.is_unique:
        raise ValueError("about has a list twice")
    missing = ~np.isin(lists.list_ids, known.index.to_numpy())
    if missing.any():
        raise ValueError(
            f"about misses {missing.sum()} of {len(missing)} lists, such as {lists.list_ids[missing][0]}"
        )
    known = known.loc[lists.list_ids]
    if known["history_length"].isna().any():
        raise ValueError("about has lists without a history_length")
    lengths, popularity = (known[name].to_numpy(np.float64) for name in ("history_length", "popularity"))
    parts = {
        "history length": buckets(lengths, lengths[lists.starts]),
        "lists of the user": buckets(np.repeat(lists.sizes, lists.sizes.astype(np.int64)), lists.sizes),
        "popularity": buckets(popularity, popularity),
    }
    return [
        {"by": by, "bucket": bucket, **row}
        for by, cut in parts.items()
        for bucket, wanted in cut
        for row in _bucket(lists.only(wanted), num_resamples)
    ]


def _bucket(lists: PerList, num_resamples: int) -> list[Row]:
    """The rows of `breakdown` for the lists of one bucket."""
    systems = lists.systems
    differences = lists.differences(pair for pair in compared_pairs(systems) if pair[1][1] == BACKBONE)
    intervals = lists.intervals([total for total, _ in differences.values()], num_resamples)
    found: dict[System, list[Interval]] = {
        mine: own for (mine, _), own in zip(differences, intervals, strict=True)
    }
    rows: list[Row] = []
    for (backbone, system), seeds in systems.items():
        means = [lists.values[backbone, system, seed].astype(np.float64).mean(axis=0) for seed in seeds]
        row: Row = {"backbone": backbone, "system": system, "lists": len(lists.users)}
        row |= {"users": len(lists.starts), "seeds": len(seeds)}
        row |= dict(zip(lists.names, np.mean(means, axis=0).tolist(), strict=True))
        for place, name in enumerate(lists.names):
            stats = interval_stats(found[backbone, system][place]) if (backbone, system) in found else {}
            row |= {f"{name} delta": stats.get("delta"), f"{name} ci95": stats.get("ci95")}
        rows.append(row)
    return rows


def buckets(values: Array, sample: Array) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    """The values [n] cut at the thirds of `sample` [m]: label with the range, and which belong to it [n]; no empty ones.

    A cut is the smallest value that at least a third (two thirds) of the sample do not exceed; equal values stay
    together. NaN is in none.
    """
    real = sample[~np.isnan(sample)]
    if not len(real):
        return []
    shares = np.arange(1, NUM_BUCKETS) / NUM_BUCKETS
    cuts = np.unique(np.quantile(real, shares, method="inverted_cdf"))
    places = np.where(np.isnan(values), -1, np.searchsorted(cuts, values, side="left"))
    found: list[tuple[str, npt.NDArray[np.bool_]]] = []
    for place in np.unique(places[places >= 0]):
        wanted = places == place
        low, high = (f"{round(float(bound), 1):g}" for bound in (values[wanted].min(), values[wanted].max()))
        found.append((low if low == high else f"{low}-{high}", wanted))
    return found
