"""Raw files of any source -> users, items and candidate lists (method.md section 1), with a report on the data.

    files --ingest--> partitions of users on disk --collect--> no duplicates, in order --peel--> k-core
    core --catalogue--> items; --split--> who is train, valid, test --build--> users and lists, one part per partition

Nothing holds the data set as a whole: files are streamed, partitions worked on side by side, and the driver knows one
number per user and one key per item. A user's events are ordered by time, ties in file order. The first ones are the
knowledge history, all the LLM sees; the later ones become candidate lists.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.data import DataSection
from dpo4rec_ray.core.candidates import SPLITS
from dpo4rec_ray.core.kcore import ItemCounts, merge_counts
from dpo4rec_ray.core.keys import Keys, seed_of
from dpo4rec_ray.datasets.files import plan_splits
from dpo4rec_ray.datasets.source import ITEMS, USERS, Source
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare.assemble import item_table, new_names, truth_table, user_blocks
from dpo4rec_ray.prepare.data_report import DataReport
from dpo4rec_ray.prepare.ingest import read_rows, write_partitions
from dpo4rec_ray.prepare.inspection import file_names, take_source
from dpo4rec_ray.prepare.logged_lists import build_logged, collect_lists, logged_user_keys
from dpo4rec_ray.prepare.partition_files import item_names, user_keys_of
from dpo4rec_ray.prepare.partitions import NUM_BINS, Counted, build, collect, peel, time_histogram, time_range
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import Progress

ARTIFACTS = ("users", "items", "truth", "lists")


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Read the dataset and write users, items, truth (empty unless it is known), lists, and data/report.json."""
    source = take_source(config)
    report = DataReport(files=file_names(source))
    folders = {name: store.start(name) for name in ARTIFACTS}
    data_folder = folders["lists"].parent
    for leftover in data_folder.glob("work-*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    # A name of its own: a killed run's last tasks may still be writing.
    work = data_folder / f"work-{uuid.uuid4().hex[:8]}"
    try:
        stats = _prepare(config, source, work, folders, store, report)
    finally:
        report.write_quarantine(data_folder / "quarantine")
        shutil.rmtree(work, ignore_errors=True)
    report.write(stats, data_folder)
    rows = {name: stats[name] for name in ARTIFACTS}
    return Outcome(rows_in=stats["rows_read"], rows_out=rows["lists"], stats=stats, rows=rows)


def _prepare(
    config: Config, source: Source, work: Path, folders: dict[str, Path], store: RunDir, report: DataReport
) -> dict[str, Any]:
    data = config.data
    event_splits, list_splits = plan_splits(source.events), plan_splits(source.lists)
    num_bytes = sum(split.size for split in event_splits + list_splits)
    num_partitions = max(1, -(-num_bytes // (data.partition_mib * 2**20)))
    partitions = range(num_partitions)
    known, item_rows, user_rows = _closed_tables(source, report, data)
    report.events = write_partitions(
        source.events, event_splits, work / "events", num_partitions, known, "prepare: reading"
    )
    report.check("events", data.max_bad_fraction)
    least = 0 if source.lists else max(2, data.user_core)  # a single event gives no list
    items, counted = _core(work, num_partitions, least, data, report)
    if source.lists:
        report.lists = write_partitions(
            source.lists, list_splits, work / "lists", num_partitions, {}, "prepare: reading lists"
        )
        report.check("lists", data.max_bad_fraction)
        tasks = [(work, p, report.lists.num_blocks) for p in partitions]
        items, counted = _counted("prepare: logged lists", collect_lists, tasks)
    elif len(items.keys) <= data.num_candidates:
        raise UserError(
            f"data.num_candidates = {data.num_candidates}, but the catalogue has only {len(items.keys)} items"
        )

    item_keys = items.keys
    catalogue = _shared(item_keys)
    if item_rows is None and source.items:
        item_rows, report.items = read_rows(source.items, ITEMS, item_keys)
        report.check("items", data.max_bad_fraction)
    names = new_names(
        item_keys, _each("prepare: items", item_names, [(work, p, catalogue) for p in partitions])
    )
    table, report.untitled_items = item_table(item_keys, names, item_rows)
    store.write("items", table)

    sizes = _first_users(np.array([one.num_users for one in counted]), data.max_users)
    keys_of_users = logged_user_keys if source.lists else user_keys_of
    found = _each("prepare: users", keys_of_users, [(work, p, int(sizes[p])) for p in partitions])
    user_keys = np.concatenate([keys for _, keys in sorted(found)])
    if user_rows is None and source.users:
        user_rows, report.users = read_rows(source.users, USERS, user_keys)
        report.check("users", data.max_bad_fraction)
    store.write("truth", truth_table(source.truth, user_keys))
    logged_splits = {split for one in counted for split in one.splits}
    # A split by time or by the log says itself what is tested; users are then drawn for validation alone.
    test_frac = (
        0.0 if data.protocol == "time" or (source.lists and None not in logged_splits) else data.test_frac
    )
    blocks, report.untold_users = user_blocks(config, user_keys, sizes, user_rows, test_frac)
    if source.lists:
        draw_valid = "valid" not in logged_splits
        tasks = [(work, p, blocks[p], catalogue, data, draw_valid, folders) for p in partitions]
        built = _each("prepare: building lists", build_logged, tasks)
    else:
        cuts_s = _cuts_in_time(work, num_partitions, data) if data.protocol == "time" else None
        seed = seed_of(config.run.seed, "lists")
        tasks = [(work, p, blocks[p], catalogue, data, cuts_s, seed, folders) for p in partitions]
        built = _each("prepare: building lists", build, tasks)
    report.built = [one for _, one in built]
    num_truth = len(user_keys) if source.truth is not None else 0
    stats = report.stats(num_users=len(user_keys), num_items=len(item_keys), num_truth=num_truth)
    _check_splits(stats["splits"])
    return stats


def _closed_tables(
    source: Source, report: DataReport, data: DataSection
) -> tuple[dict[str, Keys], pa.Table | None, pa.Table | None]:
    """Items and users of a closed source, whole, and the keys that its events must be among."""
    if not source.closed:
        return {}, None, None
    known: dict[str, Keys] = {}
    items = users = None
    if source.items:
        items, report.items = read_rows(source.items, ITEMS, None)
        report.check("items", data.max_bad_fraction)
        known["item"] = np.unique(items["key"].to_numpy())
    if source.users:
        users, report.users = read_rows(source.users, USERS, None)
        report.check("users", data.max_bad_fraction)
        known["user"] = np.unique(users["key"].to_numpy())
    return known, items, users


def _core(
    work: Path, num_partitions: int, least: int, data: DataSection, report: DataReport
) -> tuple[ItemCounts, list[Counted]]:
    """Collect every partition, then peel until users have at least `least` events and items `item_core`."""
    tasks = [(work, p, report.events.num_blocks, data.protocol, least) for p in range(num_partitions)]
    items, counted = _counted("prepare: sorting", collect, tasks)
    collected = sum(one.num_collected for one in counted)
    if collected != report.events.rows_kept:
        raise RuntimeError(f"{report.events.rows_kept} events were read, {collected} arrived in partitions")
    report.num_duplicates = sum(one.num_duplicates for one in counted)
    while len(dead := items.keys[items.counts < data.item_core]):
        shared = _shared(dead)
        items, counted = _counted(
            "prepare: k-core", peel, [(work, p, shared, least) for p in range(num_partitions)]
        )
    report.num_in_core = sum(one.num_events for one in counted)
    if collected and not report.num_in_core:
        raise UserError(
            f"no event is left of {collected}: no user has {least} events, or data.user_core = {data.user_core} and "
            f"data.item_core = {data.item_core} are too high for this dataset"
        )
    return items, counted


def _counted(
    label: str, function: Callable[..., Counted], tasks: Sequence[tuple[Any, ...]]
) -> tuple[ItemCounts, list[Counted]]:
    """Run a counting function on every partition: items over all of them, and the rest of each one's counts."""
    merged = ItemCounts(np.zeros(0, np.uint64), np.zeros(0, np.int64))
    waiting: list[ItemCounts] = []
    counted: list[Any] = [None] * len(tasks)
    for place, one in _each(label, function, tasks):
        waiting.append(one.items)
        counted[place] = replace(one, items=None)
        if sum(len(items.keys) for items in waiting) > max(2**22, len(merged.keys)):
            merged, waiting = merge_counts([merged, *waiting]), []
    return merge_counts([merged, *waiting]), counted


def _first_users(sizes: np.ndarray, max_users: int) -> np.ndarray:
    """How many users to keep of each partition: all, or the first `max_users` of all, which is a random sample."""
    if not max_users:
        return sizes
    before = np.cumsum(sizes) - sizes
    return np.clip(max_users - before, 0, sizes)


def _check_splits(splits: dict[str, int]) -> None:
    """Training, choosing and reporting each need lists; better said now than after the models have run."""
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


def _cuts_in_time(work: Path, num_partitions: int, data: DataSection) -> tuple[int, int]:
    """When validation and when test time begin: the last `test_frac` of all events, and `valid_frac` of those before."""
    tasks = [(work, p) for p in range(num_partitions)]
    ranges = [found for _, found in _each("prepare: time", time_range, tasks) if found[1] >= found[0]]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    width = (high - low) // NUM_BINS + 1
    bins = sum(
        found for _, found in _each("prepare: time", time_histogram, [(*task, low, width) for task in tasks])
    )
    done = np.cumsum(bins) / np.sum(bins)
    shares = ((1 - data.test_frac) * (1 - data.valid_frac), 1 - data.test_frac)
    valid_s, test_s = (int(low + width * np.searchsorted(done, share)) for share in shares)
    if not low < valid_s < test_s <= high:
        raise UserError(
            f'data.protocol = "time": the events (from {low} to {high} s) cannot be cut in three by time; they are too few '
            "or nearly all at one time"
        )
    return valid_s, test_s


def _each(
    label: str, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, Any]]:
    """Run a function on Ray once per partition: (partition, result) as they come. References in tasks are resolved."""
    import ray

    remote = ray.remote(function)
    place_of = {remote.remote(*task): place for place, task in enumerate(tasks)}
    left = list(place_of)
    with Progress(label, len(tasks), "partitions") as progress:
        while left:
            (ref,), left = ray.wait(left, num_returns=1)
            progress.at(len(tasks) - len(left))
            yield place_of.pop(ref), ray.get(ref)


def _shared(value: Any) -> Any:
    """A reference to what every task needs: it is stored once, not once per task."""
    import ray

    return ray.put(value)
