"""Finished runs side by side: what their recipes differ in, and paired differences of their systems on the same test lists."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dpo4rec_ray.config import Config, read_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.evaluation.per_list import PerList, interval_stats
from dpo4rec_ray.evaluation.systems import HEADLINE, NO_BACKBONE, Row, table_order
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.dependencies import by_key
from dpo4rec_ray.store.reading import without_copies

OF_PLACE = ("run.name", "run.root", "run.trackers")  # keys that say where a run and its record are
NUM_RESAMPLES = 2000
# Of a run's last round, as `validate` has them; each run's own rerankers measured them.
HELD_OUT = {
    "reward": "held-out reward",
    "reading": "reading gain",
    "reading_ndcg": "reading gain in NDCG@5",
    "others_reward": "style gain",
    "fit_above": "fit to later likes",
}


@dataclass(frozen=True)
class ComparedRun:
    """What of a run is compared. summary: of summary.json; test_lists: equal where the test lists are."""

    name: str
    config: Config
    summary: dict[str, Any]
    per_list: pd.DataFrame
    test_lists: str

    @classmethod
    def open(cls, folder: str, copies: bool = False) -> ComparedRun:
        """copies: with the lists of users that data.drift_windows writes once more.

        Raises:
            UserError: the folder is no finished run.
        """
        store = RunDir(folder)
        config = read_config(folder)
        manifest, file = store.require("per_list"), store.root / "summary.json"
        if not file.is_file():
            raise UserError(f"{folder}: no summary.json; run its recipe again to finish it")
        # A run of before has no digest; the same preparation gives the same lists.
        lists = manifest.stats.get("test_lists") or store.require("lists").fingerprint
        summary = json.loads(file.read_text(encoding="utf-8"))
        columns = ["list_id", "user_id", "system", "backbone", "seed", *HEADLINE]
        per_list = store.read("per_list", columns=columns).to_pandas()
        per_list = per_list if copies else without_copies(store, per_list)
        return cls(store.root.name, config, summary, per_list, lists)


def recipe_differences(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Key -> its value in each run, of keys that are not the same in all."""
    flat = [by_key(run.config.model_dump(mode="json")) for run in runs]
    found = {key: [one.get(key) for one in flat] for key in flat[0] if key not in OF_PLACE}
    return {key: values for key, values in found.items() if any(one != values[0] for one in values)}


def check_same_lists(runs: Sequence[ComparedRun]) -> None:
    """Raises UserError if two runs were not measured on the same test lists: their figures say nothing beside each other."""
    first = runs[0]
    for run in runs[1:]:
        if run.test_lists != first.test_lists:
            keys = [
                key
                for key in recipe_differences([first, run])
                if key.startswith(("data.", "table.", "logged.", "sample.", "run.seed"))
            ]
            raise UserError(
                f"{run.name}: its test lists are not those of {first.name}"
                + (f" ({', '.join(keys)} differ)" if keys else "")
                + "; figures of other lists are not set side by side"
            )


def differences(runs: Sequence[ComparedRun]) -> list[Row]:
    """One row per backbone, system, metric of HEADLINE and run that has the system: its level, and its difference to the first.

    "delta", "ci95", "p_value": paired on lists and common seeds, resampling users, as in evaluation.tables.comparisons; None for
    the first run and where no seed is common. "by user ...": of the mean over users.
    """
    frames = [
        run.per_list[run.per_list["backbone"] != NO_BACKBONE].assign(run=place)
        for place, run in enumerate(runs)
    ]
    whole = pd.concat(frames)
    whole["system"] = whole["run"].astype(str) + "/" + whole["system"]
    lists = PerList.of(whole, HEADLINE)
    have: dict[tuple[str, str], list[int]] = {}
    for backbone, system in lists.systems:
        place, name = system.split("/", 1)
        have.setdefault((backbone, name), []).append(int(place))
    found: list[Row] = []
    for (backbone, name), places in sorted(have.items(), key=lambda one: table_order(*one[0])):
        pairs = [
            ((backbone, f"{place}/{name}"), (backbone, f"{min(places)}/{name}")) for place in sorted(places)
        ]
        paired = lists.differences(pairs[1:])
        totals = [total for total, _ in paired.values()]
        over_lists, by_user = (lists.intervals(totals, NUM_RESAMPLES, by_user=way) for way in (False, True))
        stats = dict(zip(paired, zip(over_lists, by_user, strict=True), strict=True))
        for pair, place in zip(pairs, sorted(places), strict=True):
            for column, metric in enumerate(HEADLINE):
                own = [lists.values[(*pair[0], seed)][:, column].mean() for seed in lists.systems[pair[0]]]
                row: Row = {"backbone": backbone, "system": name, "metric": metric, "run": runs[place].name}
                row |= {"level": float(sum(own) / len(own)), "seeds": len(own)}
                if pair in stats:
                    mine, users = (one[column] for one in stats[pair])
                    row |= interval_stats(mine)
                    row |= {f"by user {key}": value for key, value in interval_stats(users).items()}
                found.append(row)
    return found


def held_out(runs: Sequence[ComparedRun]) -> list[Row]:
    """What the last round of each run did to validation users' texts, with intervals; runs without rounds are left out."""
    found: list[Row] = []
    for run in runs:
        if run.summary.get("rounds"):
            last = run.summary["rounds"][-1]
            figures = {label: last["figures"].get(name) for name, label in HELD_OUT.items()}
            found.append({"run": run.name, "round": last["round"], "kept": last["choice"]["kept"], **figures})
    return found
