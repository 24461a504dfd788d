"""What happened to the data: data/report.json, the table on the terminal, and the files of bad lines.

rows read = rows kept + quarantined (damaged) + filtered (sound, and left out by a rule), always.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dpo4rec_ray.config.data import FEW_BAD_ROWS
from dpo4rec_ray.core.candidates import SPLITS
from dpo4rec_ray.datasets.cells import way_to_read_time
from dpo4rec_ray.datasets.parsing import (
    BAD_NUMBER,
    BAD_TIME,
    EMPTY_LINE,
    FIELD_COUNT,
    OPEN_QUOTE,
    OUT_OF_RANGE,
    WRONG_ENCODING,
)
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare.ingest import FileCounts
from dpo4rec_ray.prepare.partition_lists import Built
from dpo4rec_ray.storage.places import Place, remove
from dpo4rec_ray.store.artifacts import write_json
from dpo4rec_ray.store.progress import say

KINDS = ("events", "items", "users", "lists")
# Bad lines kept per reason and kind of file; the others are only counted.
MAX_LINES = 100
# Reasons to filter an event: its user and item have an earlier one, it is outside the k-core (a user's single event gives no
# list), or its user is beyond data.max_users or has no logged list.
REPEATED, TOO_FEW, NOT_TAKEN = "repeated events", "too few events of the user or item", "user not taken"
# What else may be meant than damage where a section of the recipe says how the files are written, by reason.
ADVICE = {
    WRONG_ENCODING: "another encoding is set by {section}.encoding",
    OPEN_QUOTE: "quotes that are part of the text are told by {section}.quote and {section}.escape",
    FIELD_COUNT: "{section}.delimiter, {section}.quote and {section}.escape say how fields are written",
    BAD_NUMBER: "a decimal comma is set by {section}.decimal",
    OUT_OF_RANGE: "the range is set by {section}.min_rating and {section}.max_rating",
    BAD_TIME: "the unit of times is set by {section}.timestamp_unit",
}
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Untitled:
    """Items without a title.

    Attributes:
        num_items: all of them. num_absent: those that the items' files do not hold; the others' title is empty there.
        some_absent: some raw ids of the absent ones.
    """

    num_items: int = 0
    num_absent: int = 0
    some_absent: list[str] = field(default_factory=list[str])


@dataclass
class DataReport:
    """Filled step by step by `stages/prepare.py`.

    Attributes:
        files: names of the files of events and users.
        section: of the recipe, which says how the files of events, items and users are written; "": none does.
        counts: per kind of file, what happened to its rows.
        notes: what was found out about the files.
        num_repeated: events that are not the first of their user and item; keeps_repeated: they count too.
        num_in_core: events that were not left out as repeated ones and are in the k-core.
        times, ratings: least and greatest of all sound events.
        users_in_lists, users_without_events: users of logged lists, and those of them without an event.
        users_without_profile: users without a line in the users' files.
    """

    files: list[str]
    max_bad_fraction: float
    section: str = ""
    counts: dict[str, FileCounts] = field(default_factory=lambda: {kind: FileCounts() for kind in KINDS})
    notes: list[str] = field(default_factory=list[str])
    num_repeated: int = 0
    keeps_repeated: bool = False
    num_in_core: int = 0
    times: tuple[int, int] = (0, 0)
    ratings: tuple[float, float] = (0.0, 0.0)
    untitled: Untitled = field(default_factory=Untitled)
    users_without_profile: int = 0
    users_in_lists: int = 0
    users_without_events: int = 0
    built: list[Built] = field(default_factory=list[Built])

    def add(self, kind: str, counts: FileCounts) -> None:
        """Note what happened to the rows of a kind of file, and stop when too many of a file, or of all of them, are damaged.

        Raises:
            UserError: names the first bad line.
        """
        self.counts[kind] = counts
        if not counts.rows_read and kind in ("events", "lists"):
            raise UserError(
                f"the files of {kind} hold no row; check data.raw_dir, data.file and the recipe's patterns"
            )
        section = "logged" if kind == "lists" else self.section
        # One file of many may be damaged as a whole, and every one of many small files by a handful of rows.
        several = len(counts.by_file) > 1
        for path, alone in counts.by_file.items() if several else ():
            own = (line for line in counts.bad_lines if line["path"] == path)
            self._check_damage(alone, own, section, " of this file")
        self._check_damage(
            counts, counts.bad_lines, section, f" of {len(counts.by_file)} files" if several else ""
        )

    def _check_damage(
        self, counts: FileCounts, bad_lines: Iterable[dict[str, Any]], section: str, where: str
    ) -> None:
        """section: of the recipe that says how the files are written. where: whose rows the counts are of."""
        # An empty line is counted among the quarantined, but it is no damage.
        bad = sum(counts.quarantined.values()) - counts.quarantined[EMPTY_LINE]
        few = FEW_BAD_ROWS if self.max_bad_fraction else 0
        if bad <= max(self.max_bad_fraction * counts.rows_read, few):
            return
        first = next(line for line in bad_lines if line["reason"] != EMPTY_LINE)
        advice = ADVICE.get(first["reason"], "") if section else ""
        advice = "; " + advice.format(section=section) if advice else ""
        if advice and first["reason"] == BAD_TIME:
            advice += way_to_read_time(first["text"])
        raise UserError(
            f"{first['path']} line {first['line']}: {first['reason']}: {first['text']!r}; {bad} of {counts.rows_read} "
            f"rows{where} cannot be used ({_listed(counts.quarantined)}), more than data.max_bad_fraction = "
            f"{self.max_bad_fraction:g} allows; mend the file or raise it{advice}"
        )

    def stats(self, *, num_users: int, num_items: int, num_truth: int) -> dict[str, Any]:
        """Everything that report.json holds."""
        built, events = self.built, self.counts["events"]
        kept = sum(one.num_events for one in built)
        left_out = 0 if self.keeps_repeated else self.num_repeated
        outside = events.rows_kept - left_out - self.num_in_core
        filtered = events.filtered + Counter(
            {REPEATED: left_out, TOO_FEW: outside, NOT_TAKEN: self.num_in_core - kept}
        )
        splits = sum((one.splits for one in built), Counter[str]())
        histograms = {
            name: sum((one.histograms[name] for one in built), Counter[int]()) for name in built[0].histograms
        }
        return {
            "users": num_users,
            "items": num_items,
            "truth": num_truth,
            "lists": sum(one.num_lists for one in built),
            "events": kept,
            "positive_events": sum(one.num_positive_events for one in built),
            "positive_share": sum(one.num_positives for one in built)
            / max(1, sum(one.num_candidates for one in built)),
            "density": kept / (num_users * num_items),
            "splits": dict(sorted(splits.items())),
            "quantiles": {name: _quantiles(histogram) for name, histogram in histograms.items()},
            "files": self.files,
            "rows_read": events.rows_read,
            "lines_read": events.num_lines,
            "rows_kept": kept,
            "quarantined": dict(events.quarantined),
            "filtered": dict(filtered),
            "duplicates": "of several events of one user and item "
            + ("all count" if self.keeps_repeated else "the earliest counts"),
            "repeated_events": self.num_repeated,
            "in_core": self.num_in_core,
            "times": self.times,
            "ratings": self.ratings,
            "notes": self.notes,
            "untitled_items": self.untitled.num_items,
            "items_not_in_files": self.untitled.num_absent,
            "users_without_profile": self.users_without_profile,
            "users_in_lists": self.users_in_lists,
            "users_without_events": self.users_without_events,
            "other_files": {
                name: {
                    "rows_read": counts.rows_read,
                    "rows_wanted": counts.rows_kept,
                    "quarantined": dict(counts.quarantined),
                    "cleaned": dict(counts.cleaned),
                }
                for name, counts in self.counts.items()
                if name != "events" and counts.rows_read
            },
        }

    def write(self, stats: dict[str, Any], folder: Place) -> None:
        """Write report.json; print the table, and what is strange."""
        write_json(folder / "report.json", stats)
        for line in _table(stats):
            say(f"  {line}")
        for sentence in stats["remarks"]:
            say(f"  note: {sentence}")

    def write_quarantine(self, folder: Place) -> None:
        """One JSONL file per kind of file with its first bad lines: path, line number, reason, text."""
        remove(folder)
        for name, counts in self.counts.items():
            if not counts.bad_lines:
                continue
            folder.mkdir(exist_ok=True)
            seen: Counter[str] = Counter()
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as handle:
                for line in counts.bad_lines:
                    seen[line["reason"]] += 1
                    if seen[line["reason"]] <= MAX_LINES:
                        handle.write(json.dumps(line) + "\n")


def check_splits(splits: dict[str, int]) -> None:
    """Raises UserError if a split has no list. Without this check it would show only after models have been trained."""
    missing = [name for name in SPLITS if not splits.get(f"lists/{name}")]
    if len(missing) == len(SPLITS):
        raise UserError(
            "no candidate list could be built: every user has too few events; check data.raw_dir and data.max_history"
        )
    if missing:
        raise UserError(
            f"no list for {' and '.join(missing)}: use more users or events, other shares (data.valid_frac, "
            "data.test_frac), or name all three splits in the log"
        )


def _listed(counts: Counter[str] | dict[str, int]) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in sorted(counts.items())) or "none"


def _quantiles(histogram: Counter[int]) -> list[int]:
    """The lengths at QUANTILES of a histogram {length: number}."""
    lengths = sorted(histogram)
    done = list(itertools.accumulate(histogram[length] for length in lengths))
    return (
        [lengths[bisect.bisect_left(done, max(1, share * done[-1]))] for share in QUANTILES] if done else []
    )


def _table(stats: dict[str, Any]) -> list[str]:
    rows = [
        ("rows read", f"{stats['rows_read']:,}"),
        ("rows kept", f"{stats['rows_kept']:,}"),
        ("quarantined", _listed(stats["quarantined"])),
        ("filtered", _listed(stats["filtered"])),
        (
            "users, items",
            f"{stats['users']:,}, {stats['items']:,} (without a title: {stats['untitled_items']:,})",
        ),
        (
            "interactions",
            f"{stats['events']:,}, positive {stats['positive_events']:,}, density {stats['density']:.3%}",
        ),
        (
            "lists",
            ", ".join(
                f"{name.removeprefix('lists/')} {number:,}"
                for name, number in stats["splits"].items()
                if name.startswith("lists/")
            ),
        ),
    ]
    if stats["repeated_events"]:
        rows.insert(4, (REPEATED, f"{stats['repeated_events']:,}, {stats['duplicates']}"))
    shares = " ".join(f"{share:.0%}" for share in QUANTILES)
    rows += [
        (f"{name.replace('_', ' ')}, {shares}", " ".join(f"{value:,}" for value in values))
        for name, values in stats["quantiles"].items()
    ]
    for name, counts in stats["other_files"].items():
        bad, cleaned = _listed(counts["quarantined"]), _listed(counts["cleaned"])
        text = f"{counts['rows_read']:,} rows, {counts['rows_wanted']:,} wanted, quarantined {bad}, cleaned {cleaned}"
        rows.append((f"{name} files", text))
    width = max(len(label) for label, _ in rows)
    return [f"{label:{width}}  {value}" for label, value in rows]
