"""Study "drift": how fast knowledge goes stale, and what newer texts, a newer reranker and a newer policy bring back.

Test time is cut in windows (data.drift_windows). The recipe's run knows none of them; the variant "cut J" knows the first J, so
that its reranker and policy are from just before window J. Texts are as old as the history that they were written from: a run
has every user once more for each window, with the last events before it (`prepare`). The lists of a window are the same in
all runs, so that figures are paired list by list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.evaluation.run_comparison import ComparedRun
from dpo4rec_ray.evaluation.systems import BACKBONE
from dpo4rec_ray.prepare.partition_lists import SINCE, list_number
from dpo4rec_ray.stages.evaluate import system_name
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.studies.measures import NDCG, TEST, level, lists_of
from dpo4rec_ray.studies.study_parts import (
    NAME,
    Changes,
    Measured,
    Part,
    Row,
    SeedRuns,
    Study,
    by_name,
    said,
)
from dpo4rec_ray.studies.variants import OWN_POLICY, last_turn, trained_policy

DAY_S = 86_400
KINDS = STALE, TEXTS, RERANKER, ALL = "nothing", "texts", "texts and reranker", "all"  # what is refreshed
AGE, LISTS = "days since the cut", "lists"
ADDED, BACK = "test NDCG@5 that texts add", "test NDCG@5 against nothing refreshed"
LATER, FIRST_POLICY = "all later windows", "first policy"


def variants(config: Config) -> dict[str, Changes]:
    windows = config.data.drift_windows
    if windows < 2:
        raise UserError(
            "study drift: set data.protocol=time and data.drift_windows=4 or so; data.test_frac is then the share of the events "
            "that the windows hold"
        )
    found: dict[str, Changes] = {}
    for window in range(1, windows):
        known = (f"data.known_windows={window}",)
        found[cut(window)] = known
        if trained_policy(config):
            # As in the recipe's run, the first policy writes at the temperature of the last round.
            warmth = config.generate_by(config.run.max_rounds).temperature
            own = (f"llm.path={OWN_POLICY}", "run.num_rounds=0", f"generate.temperature={warmth}")
            found[f"{cut(window)}, {FIRST_POLICY}"] = (*known, *own)
    return found


def cut(window: int) -> str:
    """The variant that knows all before a window."""
    return f"cut {window}"


def rows(seeds: Sequence[SeedRuns]) -> list[Row]:
    windows = seeds[0].config.data.drift_windows
    found = [_kinds(seed) for seed in seeds]
    table: list[Row] = []
    for window in range(windows):
        for kind in found[0] if window else (STALE,):  # nothing is old in the first
            table.append(_row(f"{kind} refreshed, window {window}", found, kind, [window]))
    return table + [
        _row(f"{kind} refreshed, {LATER}", found, kind, list(range(1, windows))) for kind in found[0]
    ]


def _row(name: str, found: Sequence[Mapping[str, pd.DataFrame]], kind: str, windows: Sequence[int]) -> Row:
    own, stale = ([_of(tables[one], windows) for tables in found] for one in (kind, STALE))
    with_texts, of_stale = (
        Measured(tuple(_part(one, one["with texts"]) for one in frames)) for frames in (own, stale)
    )
    return {
        NAME: name,
        AGE: float(np.median(np.concatenate([one["days"] for one in own]))),
        LISTS: sum(len(one) for one in own) / len(own),
        TEST: f"{with_texts.interval.mean:.4f}",
        ADDED: Measured(tuple(_part(one, one["with texts"] - one["without"]) for one in own)),
        BACK: with_texts.minus(of_stale),
    }


def _kinds(seed: SeedRuns) -> dict[str, pd.DataFrame]:
    """What is refreshed -> NDCG@5 of each list of the users that the first cut knew, with and without texts.

    Indexed by window, user and list; the same lists in the same order for all.

    Raises:
        UserError: a window has no such list.
    """
    later = range(1, seed.config.data.drift_windows)
    first = _Copies(seed.recipe)
    stale = first.texts_of(0)
    if missing := [str(window) for window in (0, *later) if _of(stale, [window]).empty]:
        raise UserError(
            f"study drift: no user with events before the cut has a list in window {', '.join(missing)}; use fewer windows "
            "(data.drift_windows), a larger data.test_frac, or users who come back"
        )
    now = _of(stale, [0])
    newer = {
        TEXTS: [first.texts_of(window, window) for window in later],
        RERANKER: [
            _Copies(seed.variants[name]).texts_of(window, window)
            for window in later
            if (name := f"{cut(window)}, {FIRST_POLICY}") in seed.variants
        ],
        ALL: [_Copies(seed.variants[cut(window)]).texts_of(window, window) for window in later],
    }
    found = {kind: pd.concat([now, *frames]).loc[stale.index] for kind, frames in newer.items() if frames}
    return {STALE: stale, **found}


class _Copies:
    """The test lists of a run, once for each window that the user's text was written for."""

    def __init__(self, store: RunDir):
        run, stats = ComparedRun.open(str(store.root), copies=True), store.require("lists").stats
        lists = lists_of(run)
        backbone, system = run.config.evaluated_backbones[0], system_name(run.config, last_turn(store))
        users = store.read("users", columns=["user_id", "raw_id"]).to_pandas()
        base = users["user_id"] < stats["refreshed_from"]
        ids = users[base].set_index("raw_id")["user_id"]
        copies = users[~base].set_index("user_id")["raw_id"].str.rpartition(SINCE)
        again = pd.DataFrame({"user": copies[0].map(ids), "written": copies[2].astype(np.int64)})
        # The second reader of test lists beside `evaluate`: of their times alone.
        times = store.read("lists", split="test", columns=["split", "list_id", "timestamp_s"]).to_pandas()
        time_s = times.set_index("list_id")["timestamp_s"].loc[lists.list_ids].to_numpy()
        starts_s = np.array(stats["windows_s"])
        self._frame = pd.DataFrame(
            {
                "copy of": lists.users,
                "list": list_number(lists.list_ids),
                "window": np.searchsorted(starts_s, time_s, side="right") - 1,
                "days": (time_s - starts_s[0]) / DAY_S,
                "with texts": level(lists, backbone, system, NDCG)[0],
                "without": level(lists, backbone, BACKBONE, NDCG)[0],
            }
        ).join(again, on="copy of", how="inner")

    def texts_of(self, written: int, window: int | None = None) -> pd.DataFrame:
        """The lists, of one window or of all, with texts that were written when a window began."""
        chosen = self._frame["written"] == written
        if window is not None:
            chosen &= self._frame["window"] == window
        return self._frame[chosen].set_index(["window", "user", "list"]).sort_index()


def _of(frame: pd.DataFrame, windows: Sequence[int]) -> pd.DataFrame:
    return frame[frame.index.get_level_values("window").isin(windows)]


def _part(frame: pd.DataFrame, values: pd.Series) -> Part:
    return values.to_numpy(np.float64), frame.index.get_level_values("user").to_numpy().astype(np.int64)


def sentence(rows: Sequence[Row]) -> str:
    named = by_name(rows)
    fresh = named[f"{STALE} refreshed, window 0"]
    later = {kind: row for kind in KINDS if (row := named.get(f"{kind} refreshed, {LATER}"))}
    brought = "; ".join(f"{kind} {said(row[BACK])}" for kind, row in later.items() if kind != STALE)
    return (
        f"In the first window after the cut texts add {said(fresh[ADDED])} test NDCG@5; in the later ones, "
        f"{said(later[STALE][AGE])} days after it, {said(later[STALE][ADDED])} where nothing is refreshed. On the same lists "
        f"refreshing brings: {brought}."
    )


STUDY = Study(variants, rows, sentence, (ADDED, BACK), needs=None, needs_policy=False)
