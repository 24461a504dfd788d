"""What is strange about the data, in sentences: printed at the end of the stage and stored in data/report.json.

A number in a table is easily overlooked. Nothing here stops a run: each of these may be as it should.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.joins import way_to_match
from dpo4rec_ray.datasets.parsing import EMPTY_LINE
from dpo4rec_ray.errors import UserError

# Shares above (or below) which something is said.
FEW_LEFT, MANY_BAD, MOST = 0.01, 0.05, 0.5
DAY_S = 86400
# Earlier interactions than these exist in no dataset: seconds were read as milliseconds.
FIRST_YEAR_S = 315_532_800


def remarks(
    config: Config,
    stats: dict[str, Any],
    titles: pa.ChunkedArray,
    absent_ids: Sequence[str],
    unused_ids: Sequence[str],
) -> list[str]:
    """Sentences about what `DataReport.stats` counted, each with what to do.

    titles: of the catalogue. absent_ids: some ids of items that the items' files do not hold. unused_ids: some ids of these files
    that no event has.
    """
    found = [*stats["notes"], *_about_times(config, stats), *_about_ratings(config, stats)]
    found += [*_about_rows(config, stats), *_about_titles(config, stats, absent_ids, unused_ids)]
    return [*found, *_about_users(stats), *_about_same_titles(stats["items"], titles)]


def check_positives(config: Config, stats: dict[str, Any]) -> None:
    """Raises UserError if no candidate is a positive: there would be nothing to learn and nothing to measure."""
    if stats["positive_share"]:
        return
    if config.logged.file:
        raise UserError("no candidate of logged.file has a label above 0; check logged.labels")
    if not stats["positive_events"]:
        raise UserError(_none_positive(config, stats))
    raise UserError(
        f"no candidate is a positive: all {stats['positive_events']:,} positive events are in histories; lower "
        f"data.max_history = {config.data.max_history} or {_threshold(config)}"
    )


def _about_times(config: Config, stats: dict[str, Any]) -> list[str]:
    if config.data.dataset == "table" and not config.table.timestamp:
        return []  # no times are set, and all are 0
    first_s, last_s = stats["times"]
    if first_s == last_s and stats["rows_kept"]:
        return [
            f"all events have the same time ({first_s} s): there is no order in time, and histories and lists are in the "
            "order of the file"
        ]
    found = []
    if last_s > time.time() + DAY_S:
        found.append(f"the last event is of {_day(last_s)}, in the future; check the unit of the times")
    if first_s < FIRST_YEAR_S:
        all_or_some = "all" if last_s < FIRST_YEAR_S else "some"
        found.append(
            f"{all_or_some} events are from before 1980 (from {_day(first_s)} to {_day(last_s)}); check the unit of the "
            "times (table.timestamp_unit), and rows without a time"
        )
    return found


def _about_ratings(config: Config, stats: dict[str, Any]) -> list[str]:
    events, positive = stats["events"], stats["positive_events"]
    low, high = stats["ratings"]
    threshold = _threshold(config)
    if not events:
        return []
    if not positive:
        return [_none_positive(config, stats)]
    if low == high and high != 1:  # 1 is implicit feedback
        return [f"all events have the rating {high:g}, so ratings say nothing"]
    if positive == events and low != high:
        return [
            f"all {events:,} events are positive: ratings are from {low:g} to {high:g}, and {threshold}; raise it"
        ]
    return []


def _none_positive(config: Config, stats: dict[str, Any]) -> str:
    low, high = stats["ratings"]
    liked = (
        "1, which every event without a rating counts as" if low == high == 1 else "a rating that means liked"
    )
    return f"no event is positive: ratings are from {low:g} to {high:g}, and {_threshold(config)}; set it to {liked}"


def _threshold(config: Config) -> str:
    return f"data.positive_rating = {config.data.positive_rating:g}"


def _about_rows(config: Config, stats: dict[str, Any]) -> list[str]:
    read, repeated, data = stats["rows_read"], stats["repeated_events"], config.data
    left_out = 0 if data.keeps_repeated_events else repeated
    bad = sum(number for reason, number in stats["quarantined"].items() if reason != EMPTY_LINE)
    found = []
    if bad > MANY_BAD * read:
        found.append(
            f"{bad:,} of {read:,} rows were damaged and left out; data/quarantine shows the first of them"
        )
    if repeated > MOST * read:
        what = "kept" if data.keeps_repeated_events else "left out"
        found.append(
            f"{repeated:,} of {read:,} events are repeated ones of the same user and item, and were {what} "
            "(data.repeated_events)"
        )
    core = stats["in_core"]
    if core < FEW_LEFT * (read - bad - left_out):
        found.append(_few_left(config, core, read))
    return found


def _few_left(config: Config, core: int, read: int) -> str:
    data = config.data
    if data.user_core > 2 or data.item_core > 1:
        return (
            f"the k-core leaves {core:,} of {read:,} events; lower data.user_core = {data.user_core} or data.item_core = "
            f"{data.item_core}"
        )
    # Without a k-core nothing but users with a single event is left out.
    column = f"{config.table.user!r} (table.user)" if data.dataset == "table" else "the users' column"
    return (
        f"{core:,} of {read:,} events are left: most users have a single event, which gives no list; is {column} a session, or "
        "the wrong column?"
    )


def _about_titles(
    config: Config, stats: dict[str, Any], absent_ids: Sequence[str], unused_ids: Sequence[str]
) -> list[str]:
    items, untitled, absent = stats["items"], stats["untitled_items"], stats["items_not_in_files"]
    if "items" not in stats["other_files"] or untitled <= MOST * items:
        return []
    if config.data.dataset == "table" and not config.table.title:
        return []  # no titles are set
    why = "their title is empty in the items' file"
    if absent:
        why = f"{absent_ids[0]!r} is not in the items' file"
        if absent < untitled:
            why = f"the title of {untitled - absent:,} is empty in the items' file, and {absent:,} are not in it, such as "
            why += repr(absent_ids[0])
        unused = f", and {unused_ids[0]!r} of the items' file has no event" if unused_ids else ""
        why += unused + way_to_match(absent_ids, unused_ids)
    return [f"{untitled:,} of {items:,} items have no title and go by their ids: {why}"]


def _about_users(stats: dict[str, Any]) -> list[str]:
    users, found = stats["users"], []
    if "users" in stats["other_files"] and stats["users_without_profile"] > MOST * users:
        found.append(
            f"{stats['users_without_profile']:,} of {users:,} users have no profile; do the ids of both files agree?"
        )
    if stats["users_without_events"] > MOST * stats["users_in_lists"]:
        found.append(
            f"{stats['users_without_events']:,} of {stats['users_in_lists']:,} users of the lists have no event, and no "
            "history"
        )
    return found


def _about_same_titles(items: int, titles: pa.ChunkedArray) -> list[str]:
    if len(titles) < 2:
        return []
    # In Arrow: there are as many distinct titles as items, and a Python object of each would be far larger than the column.
    found = pc.value_counts(titles.cast(pa.large_string()))  # there may be more than 2 GiB of them
    counts = found.field("counts")
    most = pc.max(counts).as_py()
    if most <= MOST * items:
        return []
    title = found.field("values")[pc.index(counts, most).as_py()].as_py()
    return [f"{most:,} of {items:,} items have the same title: {title[:60]!r}"]


def _day(time_s: int) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d")
