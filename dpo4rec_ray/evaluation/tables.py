"""Tables of the evaluation from the metrics per list: means and deviations, paired differences, breakdowns.

Pure pandas and numpy; stages/evaluate.py hands over its figures and report.py shows what comes out. Departs from the paper:
means over users stand beside those over lists (few users hold many lists), every difference is paired on identical lists
and seeds and has an interval clustered by user, and random order, popularity and the upper bound stand in every table.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from dpo4rec_ray.core.intervals import Interval, bootstrap_columns
from dpo4rec_ray.evaluation.paper_table import (
    BACKBONE,
    HEADLINE,
    LABELS,
    NO_BACKBONE,
    Row,
    interval,
    label,
    paired,
    to_csv,
    to_latex,
    to_markdown,
)
from dpo4rec_ray.store.schemas import EVALUATED_AT, EVALUATED_METRICS

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
Fit = tuple[str, str, int]  # backbone, system, seed

METRIC_NAMES = tuple(f"{metric}@{k}" for metric in EVALUATED_METRICS for k in EVALUATED_AT)
DETAILED = (*HEADLINE, "map@5")  # those also given by user and over the lists with a positive
PRINTED = (*HEADLINE, "map@5", "mrr@10", "hr@10")  # on the terminal
POPULARITY, UPPER_BOUND = "popularity", "upper-bound"
_ROUND = re.compile(r"dpo4rec-round(\d+)")
NUM_BUCKETS = 3


@dataclass(frozen=True)
class _Lists:
    """Every fit's metrics on the same lists, which stand by user, then by list id.

    list_ids, users: [n]; values: [n, metrics] per fit, in the order of `names`.
    """

    list_ids: Array
    users: Array
    names: tuple[str, ...]
    values: dict[Fit, Array]

    @classmethod
    def of(cls, per_list: pd.DataFrame, names: tuple[str, ...] = METRIC_NAMES) -> _Lists:
        """The rows of `per_list`, put in order fit by fit.

        Raises:
            ValueError: no rows, a list twice in one fit, or fits measured on different lists.
        """
        if per_list.empty:
            raise ValueError("per_list has no rows: nothing was evaluated")
        list_ids, users = per_list["list_id"].to_numpy(), per_list["user_id"].to_numpy()
        columns = [per_list[name].to_numpy() for name in names]
        first: tuple[Array, Array] | None = None
        values: dict[Fit, Array] = {}
        fits: dict[Any, Array] = per_list.groupby(["backbone", "system", "seed"]).indices
        for key, rows in fits.items():
            rows = rows[np.lexsort((list_ids[rows], users[rows]))]
            if first is None:
                first = list_ids[rows], users[rows]
                if len(np.unique(first[0])) < len(rows):
                    raise ValueError(f"{key} has rows of one list twice")
            elif not (np.array_equal(first[0], list_ids[rows]) and np.array_equal(first[1], users[rows])):
                raise ValueError(f"{key} was not measured on the lists of the other fits; evaluate again")
            backbone, system, seed = key
            values[backbone, system, int(seed)] = np.stack([column[rows] for column in columns], axis=1)
        assert first is not None
        return cls(*first, names, values)

    @property
    def systems(self) -> dict[tuple[str, str], list[int]]:
        """(backbone, system) -> its seeds, in the order of the tables."""
        found: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        for backbone, system, seed in sorted(self.values, key=lambda fit: (_place(*fit[:2]), fit[2])):
            found[backbone, system].append(seed)
        return dict(found)

    @property
    def starts(self) -> Array:
        """Where each user's lists begin, [G]."""
        return np.flatnonzero(np.r_[True, self.users[1:] != self.users[:-1]])

    @property
    def sizes(self) -> FloatArray:
        """Lists of each user, [G]."""
        return np.diff(np.r_[self.starts, len(self.users)]).astype(np.float64)

    def user_sums(self, fit: Fit) -> FloatArray:
        """Each metric summed over each user's lists, [G, metrics]."""
        return np.add.reduceat(self.values[fit].astype(np.float64), self.starts, axis=0)

    def only(self, wanted: npt.NDArray[np.bool_]) -> _Lists:
        """The lists where `wanted` [n] holds."""
        values = {fit: rows[wanted] for fit, rows in self.values.items()}
        return replace(self, list_ids=self.list_ids[wanted], users=self.users[wanted], values=values)

    def difference(self, mine: tuple[str, str], theirs: tuple[str, str]) -> tuple[FloatArray, FloatArray]:
        """One system minus another on their common seeds: user sums of the seeds' mean [G, m], means per seed [S, m].

        A system without a backbone has no seeds of its own: it meets every seed. No common seed gives S = 0.
        """
        systems = self.systems
        seeds = [seed for seed in systems[mine] if theirs[0] == NO_BACKBONE or seed in systems[theirs]]
        total = np.zeros((len(self.starts), len(self.names)))
        means = np.empty((len(seeds), len(self.names)))
        for row, seed in enumerate(seeds):
            other = systems[theirs][0] if theirs[0] == NO_BACKBONE else seed
            delta = self.user_sums((*mine, seed)) - self.user_sums((*theirs, other))
            total += delta / len(seeds)
            means[row] = delta.sum(axis=0) / len(self.users)
        return total, means


def summarise(
    per_list: pd.DataFrame, about: pd.DataFrame, num_resamples: int = 2000, paper: str | None = None
) -> dict[str, Any]:
    """Everything the tables show, ready for JSON: "evaluation", "systems", "comparisons", "breakdown", "paper".

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
    }


def seed_rows(per_list: pd.DataFrame) -> list[Row]:
    """One row per backbone, system and seed, in the order of the tables.

    per_list: list_id, user_id, system, backbone, seed and METRIC_NAMES; one row per list and fit. A row has each metric's
    mean over lists, and for DETAILED also "<metric> by user" (mean over users of the mean over a user's lists) and
    "<metric> on lists with a positive" (None where no list has one). The ceiling is the row of `upper-bound`.

    Raises:
        ValueError: no rows, a list twice in one fit, fits measured on different lists, or no upper bound.
    """
    lists = _Lists.of(per_list)
    if (NO_BACKBONE, UPPER_BOUND) not in lists.systems:
        raise ValueError(f"per_list has no rows of {UPPER_BOUND}, which says what lists have a positive")
    best = lists.values[NO_BACKBONE, UPPER_BOUND, lists.systems[NO_BACKBONE, UPPER_BOUND][0]]
    has_positive = best[:, METRIC_NAMES.index("hr@1")] > 0
    found: list[Row] = []
    for (backbone, system), seeds in lists.systems.items():
        for seed in seeds:
            values = lists.values[backbone, system, seed].astype(np.float64)
            row: Row = {"system": system, "backbone": backbone, "seed": seed, "num_lists": len(values)}
            row |= _named(METRIC_NAMES, values.mean(axis=0))
            by_user = (lists.user_sums((backbone, system, seed)) / lists.sizes[:, None]).mean(axis=0)
            row |= {f"{name} by user": float(by_user[METRIC_NAMES.index(name)]) for name in DETAILED}
            for name in DETAILED:
                reachable = values[has_positive, METRIC_NAMES.index(name)]
                row[f"{name} on lists with a positive"] = float(reachable.mean()) if len(reachable) else None
            found.append(row)
    return found


def systems_table(rows: Sequence[Row]) -> list[Row]:
    """Mean and "<figure> sd" (standard deviation, n - 1) over seeds of each backbone and system of `seed_rows`.

    Random and popularity first, then each backbone: alone, with base knowledge, with each round's; upper-bound last.
    One seed has no deviation: None.
    """
    groups: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["backbone"], row["system"]].append(row)
    table: list[Row] = []
    for (backbone, system), own in sorted(groups.items(), key=lambda group: _place(*group[0])):
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


def comparisons(per_list: pd.DataFrame, num_resamples: int = 2000) -> list[Row]:
    """Paired differences on identical lists and seeds, one row per pair of systems and metric.

    Per backbone: each knowledge system minus the backbone, each round minus the base knowledge, and the backbone minus
    popularity. "delta" is the mean over lists of the difference, averaged over the common seeds ("seeds", at least 1);
    "delta sd" is its deviation over those seeds, None for one. "ci95" [low, high] and "p_value" (two-sided, for 0) come
    from resampling users with all their lists, as `core.metrics.paired_bootstrap` does, after a list's difference was
    averaged over the seeds: they say how far other users would move the figure of these fits, while "delta sd" says
    how far other fits would. With one user they are None. "by user delta", "by user ci95" and "by user p_value" are the
    same for the mean over users of the mean over a user's lists, in which every user counts alike. Every pair and metric
    is resampled with the same users. A pair without a common seed is left out.

    Raises:
        ValueError: as `seed_rows`, or a metric is not finite.
    """
    lists = _Lists.of(per_list)
    pairs, sums, means = [], [], []
    for mine, theirs in _pairs(lists):
        total, per_seed = lists.difference(mine, theirs)
        if len(per_seed):
            pairs.append((mine, theirs))
            sums.append(total)
            means.append(per_seed)
    if not pairs:
        return []
    columns = np.concatenate(sums, axis=1)
    intervals = iter(bootstrap_columns(columns, lists.sizes, num_resamples))
    by_user = iter(
        bootstrap_columns(columns / lists.sizes[:, None], np.ones(len(lists.sizes)), num_resamples)
    )
    return [
        {
            "backbone": mine[0],
            "system": mine[1],
            "against": theirs[1],
            "metric": name,
            "seeds": len(per_seed),
            "delta sd": float(per_seed[:, place].std(ddof=1)) if len(per_seed) > 1 else None,
            **_figures(next(intervals)),
            **{f"by user {name}": value for name, value in _figures(next(by_user)).items()},
        }
        for (mine, theirs), per_seed in zip(pairs, means, strict=True)
        for place, name in enumerate(lists.names)
    ]


def _pairs(lists: _Lists) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """(backbone, system) and what it is set against."""
    systems = lists.systems
    bases = [key for key in systems if key[0] != NO_BACKBONE and key[1] != BACKBONE and not _round(key[1])]
    for backbone, system in systems:
        if backbone == NO_BACKBONE:
            continue
        if system == BACKBONE:
            others = [(NO_BACKBONE, POPULARITY)]
        else:
            others = [
                (backbone, BACKBONE),
                *(base for base in bases if base[0] == backbone and _round(system)),
            ]
        yield from (((backbone, system), other) for other in others if other in systems)


def breakdown(per_list: pd.DataFrame, about: pd.DataFrame, num_resamples: int = 2000) -> list[Row]:
    """HEADLINE of every system by length of the user's history, by the user's number of lists, and by popularity.

    Thirds of the users, for popularity of the lists. The knowledge history is capped, so that it tells users who did little
    apart; the number of lists tells those who did much.

    about: list_id, history_length (events of the user's knowledge history) and popularity (mean training positives per
    positive item of the list; NaN for a list without a positive: those are left out there). A row has "by", "bucket" (the
    range of its lists, e.g. "8-15"), "lists", "users", "seeds", means over lists and seeds, and "<metric> delta" and
    "<metric> ci95" against the backbone as in `comparisons` (None for the backbone itself and without a backbone). Equal
    values stay in one bucket, so that there may be fewer than three.

    Raises:
        ValueError: as `comparisons`, or `about` misses a list, has it twice, or a history_length is NaN.
    """
    lists = _Lists.of(per_list, HEADLINE)
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
    found: list[Row] = []
    lengths, popularity = (known[name].to_numpy(np.float64) for name in ("history_length", "popularity"))
    parts = {
        "history length": buckets(lengths, lengths[lists.starts]),
        "lists of the user": buckets(np.repeat(lists.sizes, lists.sizes.astype(np.int64)), lists.sizes),
        "popularity": buckets(popularity, popularity),
    }
    for by, cut in parts.items():
        for bucket, wanted in cut:
            found += [
                {"by": by, "bucket": bucket, **row} for row in _bucket(lists.only(wanted), num_resamples)
            ]
    return found


def _bucket(lists: _Lists, num_resamples: int) -> list[Row]:
    """The rows of `breakdown` for the lists of one bucket."""
    systems = lists.systems
    against = {mine: theirs for mine, theirs in _pairs(lists) if theirs == (mine[0], BACKBONE)}
    sums = {mine: lists.difference(mine, theirs) for mine, theirs in against.items()}
    sums = {mine: total for mine, (total, per_seed) in sums.items() if len(per_seed)}
    intervals: dict[tuple[str, str], list[Interval]] = {}
    if sums:
        width = len(lists.names)
        every = bootstrap_columns(np.concatenate(list(sums.values()), axis=1), lists.sizes, num_resamples)
        intervals = {mine: every[place * width :][:width] for place, mine in enumerate(sums)}
    rows: list[Row] = []
    for (backbone, system), seeds in systems.items():
        means = [lists.values[backbone, system, seed].astype(np.float64).mean(axis=0) for seed in seeds]
        row: Row = {"backbone": backbone, "system": system, "lists": len(lists.users)}
        row |= {"users": len(lists.starts), "seeds": len(seeds)}
        row |= _named(lists.names, np.mean(means, axis=0))
        for place, name in enumerate(lists.names):
            figures = _figures(intervals[backbone, system][place]) if (backbone, system) in intervals else {}
            row |= {f"{name} delta": figures.get("delta"), f"{name} ci95": figures.get("ci95")}
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


def _figures(found: Interval) -> Row:
    known = not np.isnan(found.p_value)
    return {
        "delta": found.mean,
        "ci95": [found.low, found.high] if known else [None, None],
        "p_value": found.p_value if known else None,
    }


def _named(names: Sequence[str], values: FloatArray) -> Row:
    return dict(zip(names, values.tolist(), strict=True))


def _round(system: str) -> int:
    """The round whose knowledge a system uses, 0 where that is none."""
    found = _ROUND.fullmatch(system)
    return int(found[1]) if found else 0


def _place(backbone: str, system: str) -> tuple[object, ...]:
    """Sort key of the tables."""
    if backbone == NO_BACKBONE:
        return (2 if system == UPPER_BOUND else 0, system != "random", system)
    order = list(LABELS)
    known = order.index(backbone) if backbone in order else len(order)
    return (1, known, backbone, system != BACKBONE, _round(system), system)


def printed(summary: dict[str, Any]) -> str:
    """The table and the differences for a terminal, at most 110 characters wide. summary: of `summarise`."""
    by_user = [f"{name} by user" for name in HEADLINE]
    heads = "".join(f"{name:>17}" for name in HEADLINE) + "".join(f"{name:>8}" for name in PRINTED[2:])
    lines = [f"{'backbone':<9}{'system':<16}{heads}{'by user: map, ndcg':>20}{'seeds':>6}"]
    for row in summary["systems"]:
        cells = "".join(f"{_with_sd(row, name):>17}" for name in HEADLINE)
        cells += "".join(f"{row[name]:>8.4f}" for name in PRINTED[2:])
        cells += f"{', '.join(f'{row[name]:.4f}' for name in by_user):>20}"
        lines.append(f"{_cut(label(row['backbone']), 9)}{_cut(row['system'], 16)}{cells}{row['seeds']:>6}")
    pairs = paired(summary["comparisons"])
    if pairs:
        heads = "".join(f"{name:<36}" for name in HEADLINE).rstrip()
        lines += [
            "",
            "Differences on identical lists, 95 % interval and p-value over users (sd over seeds: comparisons.csv):",
        ]
        lines.append(f"{'backbone':<9}{'system':<16}{'against':<13}{heads}")
    for rows in pairs:
        first = rows[HEADLINE[0]]
        names = _cut(label(first["backbone"]), 9) + _cut(first["system"], 16) + _cut(first["against"], 13)
        lines.append((names + "".join(f"{interval(rows[name]):<36}" for name in HEADLINE)).rstrip())
        by_user = "".join(f"{interval(rows[name], 'by user '):<36}" for name in HEADLINE).rstrip()
        lines.append(f"{'':<25}{'  by user':<13}{by_user}")
    return "\n".join(lines)


def _with_sd(row: Row, name: str) -> str:
    return f"{row[name]:.4f}" + ("" if row[f"{name} sd"] is None else f" ±{row[f'{name} sd']:.4f}")


def _cut(name: str, width: int) -> str:
    return f"{name if len(name) < width else name[: width - 2] + '…':<{width}}"


def write_tables(folder: str | Path, summary: dict[str, Any]) -> list[Path]:
    """Write the tables of `summarise` into an existing folder; return the files.

    table.csv: every figure of every system; table1.csv, table.md, table.tex: the paper's Table I for this run;
    comparisons.csv and breakdown.csv. In CSV an interval is two columns, "<name>_low" and "<name>_high".
    """
    systems, compared, paper = summary["systems"], summary["comparisons"], summary["paper"]
    contents = {
        "table.csv": _csv(systems),
        "table1.csv": to_csv(systems, compared, paper),
        "table.md": to_markdown(systems, compared, paper),
        "table.tex": to_latex(systems, compared, paper),
        "comparisons.csv": _csv(compared),
        "breakdown.csv": _csv(summary["breakdown"]),
    }
    files = [Path(folder) / name for name in contents]
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
