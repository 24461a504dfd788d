"""Tables of the evaluation from the metrics per list: means and deviations, and paired differences.

Departs from the paper: means over users are given beside those over lists (few users hold many lists), every difference is
paired on identical lists and seeds and has an interval clustered by user, and random order, popularity and the upper bound
are in every table.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dpo4rec_ray.evaluation.breakdown import breakdown
from dpo4rec_ray.evaluation.paper_table import layout
from dpo4rec_ray.evaluation.per_list import PerList, interval_stats
from dpo4rec_ray.evaluation.systems import (
    DETAILED,
    METRIC_NAMES,
    NO_BACKBONE,
    UPPER_BOUND,
    Row,
    compared_pairs,
    table_order,
)
from dpo4rec_ray.evaluation.table_formats import to_latex, to_markdown
from dpo4rec_ray.storage.places import Place, place


def summarise(
    per_list: pd.DataFrame, about: pd.DataFrame, num_resamples: int, paper: str | None = None
) -> dict[str, Any]:
    """Everything the tables show, ready for JSON: "evaluation", "systems", "comparisons", "breakdown", "paper"; and how many
    "test_users" and "test_lists" there are.

    The lists of `seed_rows`, `systems_table`, `comparisons` and `breakdown`, which say what they take and raise; paper:
    a key of `paper_table.TABLE_I` whose values are set beside this run's, None for none.
    """
    rows = seed_rows(per_list)
    return {
        "evaluation": rows,
        "systems": systems_table(rows),
        "comparisons": comparisons(per_list, num_resamples),
        "breakdown": breakdown(per_list, about, num_resamples),
        "paper": paper,
        "test_users": int(per_list["user_id"].nunique()),
        "test_lists": int(per_list["list_id"].nunique()),
    }


def seed_rows(per_list: pd.DataFrame) -> list[Row]:
    """One row per backbone, system and seed, in the order of the tables.

    per_list: list_id, user_id, system, backbone, seed and METRIC_NAMES; one row per list and fit. A row has each metric's
    mean over lists, and for DETAILED also "<metric> by user" (mean over users of the mean over a user's lists) and
    "<metric> on lists with a positive" (None where no list has one). The row of `upper-bound` has the highest values that
    any ranking can reach.

    Raises:
        ValueError: no rows, a list twice in one fit, fits measured on different lists, or no upper bound.
    """
    lists = PerList.of(per_list)
    if (NO_BACKBONE, UPPER_BOUND) not in lists.systems:
        raise ValueError(f"per_list has no rows of {UPPER_BOUND}, which show what lists have a positive")
    best = lists.values[NO_BACKBONE, UPPER_BOUND, lists.systems[NO_BACKBONE, UPPER_BOUND][0]]
    has_positive = best[:, METRIC_NAMES.index("hr@1")] > 0
    found: list[Row] = []
    for (backbone, system), seeds in lists.systems.items():
        for seed in seeds:
            values = lists.values[backbone, system, seed].astype(np.float64)
            row: Row = {"system": system, "backbone": backbone, "seed": seed, "num_lists": len(values)}
            row |= dict(zip(METRIC_NAMES, values.mean(axis=0).tolist(), strict=True))
            by_user = (lists.user_sums((backbone, system, seed)) / lists.sizes[:, None]).mean(axis=0)
            row |= {f"{name} by user": float(by_user[METRIC_NAMES.index(name)]) for name in DETAILED}
            for name in DETAILED:
                reachable = values[has_positive, METRIC_NAMES.index(name)]
                row[f"{name} on lists with a positive"] = float(reachable.mean()) if len(reachable) else None
            found.append(row)
    return found


def systems_table(rows: Sequence[Row]) -> list[Row]:
    """Mean and "<metric> sd" (standard deviation, n - 1) over seeds of each backbone and system of `seed_rows`.

    Random and popularity first, then each backbone: without knowledge, with base knowledge, with each round's; upper-bound last.
    One seed has no deviation: None.
    """
    groups: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["backbone"], row["system"]].append(row)
    table: list[Row] = []
    for (backbone, system), own in sorted(groups.items(), key=lambda group: table_order(*group[0])):
        entry: Row = {"system": system, "backbone": backbone, "seeds": len(own), "lists": own[0]["num_lists"]}
        for name in own[0]:
            if name in ("system", "backbone", "seed", "num_lists"):
                continue
            values = [row[name] for row in own]
            known = None not in values
            entry[name] = statistics.fmean(values) if known else None
            entry[f"{name} sd"] = statistics.stdev(values) if known and len(values) > 1 else None
        table.append(entry)
    return table


def comparisons(per_list: pd.DataFrame, num_resamples: int) -> list[Row]:
    """Paired differences on identical lists and seeds, one row per pair of systems and metric.

    Per backbone: each knowledge system minus the backbone, each round minus the base knowledge, and the backbone minus
    popularity. "delta" is the mean over lists of the difference, averaged over the common seeds ("seeds", at least 1);
    "delta sd" is its deviation over those seeds, None for one. "ci95" [low, high] and "p_value" (two-sided, for 0) come
    from resampling users with all their lists, as `core.intervals.paired_bootstrap` does, after a list's difference was
    averaged over the seeds. They say how much the difference of these fits would change with other users; "delta sd"
    says how much it changes with other fits. With one user they are None. "by user delta", "by user ci95" and "by user
    p_value" are the same for the mean over users of the mean over a user's lists, in which every user has the same
    weight. Every pair and metric is resampled with the same users. A pair without a common seed is left out.

    Raises:
        ValueError: as `seed_rows`, or a metric is not finite.
    """
    lists = PerList.of(per_list)
    differences = lists.differences(compared_pairs(lists.systems))
    totals = [total for total, _ in differences.values()]
    over_lists, by_user = (lists.intervals(totals, num_resamples, by_user=way) for way in (False, True))
    return [
        {
            "backbone": mine[0],
            "system": mine[1],
            "against": theirs[1],
            "metric": name,
            "seeds": len(per_seed),
            "delta sd": float(per_seed[:, place].std(ddof=1)) if len(per_seed) > 1 else None,
            **interval_stats(own[place]),
            **{f"by user {name}": value for name, value in interval_stats(users[place]).items()},
        }
        for ((mine, theirs), (_, per_seed)), own, users in zip(
            differences.items(), over_lists, by_user, strict=True
        )
        for place, name in enumerate(lists.names)
    ]


def write_tables(folder: str | Path, summary: dict[str, Any]) -> list[Place]:
    """Write the tables of `summarise` into an existing folder; return the files.

    table.csv: every metric of every system; table1.csv, table.md, table.tex: the paper's Table I for this run;
    comparisons.csv and breakdown.csv. CSV has all digits, is empty where there is no value, and an interval is two columns,
    "<name>_low" and "<name>_high".
    """
    systems, compared, paper = summary["systems"], summary["comparisons"], summary["paper"]
    contents = {
        "table.csv": _csv(systems),
        "table1.csv": _csv(layout(systems, compared, paper)),
        "table.md": to_markdown(systems, compared, paper),
        "table.tex": to_latex(systems, compared, paper),
        "comparisons.csv": _csv(compared),
        "breakdown.csv": _csv(summary["breakdown"]),
    }
    files = [place(folder) / name for name in contents]
    for file, content in zip(files, contents.values(), strict=True):
        file.write_text(content, encoding="utf-8")
    return files


def _csv(rows: Sequence[Row]) -> str:
    flat: list[Row] = []
    for row in rows:
        line: Row = {}
        for name, value in row.items():
            if name.endswith("ci95"):
                line[f"{name}_low"], line[f"{name}_high"] = value or (None, None)
            else:
                line[name] = value
        flat.append(line)
    return pd.DataFrame(flat).to_csv(index=False, lineterminator="\n")
