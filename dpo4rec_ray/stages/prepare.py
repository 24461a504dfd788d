"""Raw files of any source -> users, items and candidate lists (docs/method.md, section 1), with a report on the data.

    files --ingest--> partitions of users on disk --collect--> in order, once each --peel--> k-core
    core --catalogue--> items; --split--> who is train, valid, test --build--> users and lists, one part per partition

Nothing holds the whole data set: files are streamed, partitions are worked on side by side, and the driver knows one
number per user and one key per item. A user's events are ordered by time, events of the same time by their place in the
file. The first ones are the knowledge history, which is all that the LLM sees; the later ones become candidate lists.
"""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any

import numpy as np

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.kcore import merge_counts
from dpo4rec_ray.core.keys import Keys, seed_of
from dpo4rec_ray.datasets.files import plan_splits
from dpo4rec_ray.datasets.source import Source
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare.assemble import (
    Wanted,
    catalogue_table,
    first_users,
    new_names,
    refreshed_blocks,
    rows_about,
    truth_table,
    user_blocks,
)
from dpo4rec_ray.prepare.data_remarks import check_positives, remarks
from dpo4rec_ray.prepare.data_report import DataReport, check_splits
from dpo4rec_ray.prepare.ingest import write_partitions
from dpo4rec_ray.prepare.inspection import file_names, file_notes, take_source
from dpo4rec_ray.prepare.logged_lists import (
    EventIds,
    build_logged,
    check_lists,
    collect_lists,
    logged_user_keys,
)
from dpo4rec_ray.prepare.partition_files import item_names, some_ids, user_keys_of
from dpo4rec_ray.prepare.partition_lists import build_drawn, build_refreshed, find_refreshed
from dpo4rec_ray.prepare.partition_tasks import counted, cuts_in_time, each, in_order, k_core, shared
from dpo4rec_ray.storage.places import Place, remove
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.outcome import Outcome

ARTIFACTS = ("users", "items", "truth", "lists")


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Read the dataset and write users, items, truth (empty unless it is known), lists, and data/report.json."""
    source = take_source(config)
    section = "table" if config.data.dataset == "table" else ""
    report = DataReport(file_names(source), config.data.max_bad_fraction, section, notes=file_notes(source))
    folders = {name: store.start(name) for name in ARTIFACTS}
    data_folder = folders["lists"].parent
    for leftover in data_folder.glob("work-*"):  # of a run that was killed
        remove(leftover)
    # A new name each time: the last tasks of a killed run may still be writing.
    work = data_folder / f"work-{uuid.uuid4().hex[:8]}"
    try:
        stats = _prepare(config, source, work, folders, store, report)
    finally:
        report.write_quarantine(data_folder / "quarantine")
        remove(work)
    report.write(stats, data_folder)
    rows = {name: stats[name] for name in ARTIFACTS} | {"users": stats["rows_of_users"]}
    return Outcome(rows_in=stats["rows_read"], rows_out=rows["lists"], stats=stats, rows=rows)


def _prepare(
    config: Config, source: Source, work: Place, folders: dict[str, Place], store: RunDir, report: DataReport
) -> dict[str, Any]:
    data = config.data
    event_splits, list_splits = plan_splits(source.events), plan_splits(source.lists)
    num_bytes = sum(split.size for split in event_splits + list_splits)
    num_partitions = max(1, -(-num_bytes // (data.partition_mib * 2**20)))
    partitions = range(num_partitions)

    # The events of a closed source must be of users and items that it describes, so these are read first, all of them.
    item_rows = rows_about("items", source, None, report, data) if source.closed else None
    user_rows = rows_about("users", source, None, report, data) if source.closed else None
    described = {"item": item_rows, "user": user_rows}
    known = {name: np.unique(rows["key"].to_numpy()) for name, rows in described.items() if rows is not None}
    report.add(
        "events",
        write_partitions(
            source.events, event_splits, work / "events", num_partitions, known, "prepare: reading", data
        ),
    )
    user_core = 0 if source.lists else max(2, data.user_core)  # a single event gives no list
    items, counts = k_core(work, num_partitions, user_core, data, report)
    if source.lists:
        report.add(
            "lists",
            write_partitions(
                source.lists, list_splits, work / "lists", num_partitions, {}, "prepare: reading lists", data
            ),
        )
        in_events = EventIds(
            items.keys,
            sum(one.num_users for one in counts),
            *(some_ids(work, name) for name in ("user", "item")),
        )
        tasks = [(work, p, report.counts["lists"].num_blocks) for p in partitions]
        listed, counts = counted("prepare: logged lists", collect_lists, tasks, data)
        items = merge_counts([items, listed])
    elif len(items.keys) <= data.num_candidates:
        raise UserError(
            f"data.num_candidates = {data.num_candidates}, but the catalogue has only {len(items.keys)} items; lower it or "
            "use more items"
        )

    item_keys, catalogue = items.keys, shared(items.keys)
    if not source.closed:
        asked = Wanted(item_keys, partial(some_ids, work, "item"))
        item_rows = rows_about("items", source, asked, report, data)
    if source.lists:
        check_lists(work, in_events, listed.keys, counts, item_rows)
        report.users_in_lists = sum(one.num_users for one in counts)
        report.users_without_events = report.users_in_lists - sum(one.num_known_users for one in counts)
    names = new_names(
        item_keys, each("prepare: items", item_names, [(work, p, catalogue) for p in partitions], data)
    )
    table, report.untitled = catalogue_table(item_keys, names, item_rows)
    store.write("items", table)

    sizes = first_users(np.array([one.num_users for one in counts]), data.max_users)
    tasks = [(work, p, int(sizes[p])) for p in partitions]
    user_keys: Keys = np.concatenate(
        in_order("prepare: users", logged_user_keys if source.lists else user_keys_of, tasks, data)
    )
    if not source.closed:
        asked = Wanted(user_keys, partial(some_ids, work, "user"))
        user_rows = rows_about("users", source, asked, report, data)
    logged_splits = {split for one in counts for split in one.splits}
    # A split by time, or by the log, says itself what is tested. Users are then drawn for validation alone.
    drawn_for_test = data.protocol != "time" and (not source.lists or None in logged_splits)
    test_frac = data.test_frac if drawn_for_test else 0.0
    blocks, report.users_without_profile = user_blocks(config, user_keys, sizes, user_rows, test_frac)
    drift: dict[str, Any] = {}
    num_users = len(user_keys)  # copies of users, for windows of test time, are no users more
    if source.lists:
        draw_valid = "valid" not in logged_splits
        tasks = [(work, p, blocks[p], catalogue, data, draw_valid, folders) for p in partitions]
        report.built = in_order("prepare: building lists", build_logged, tasks, data)
    else:
        cuts = cuts_in_time(work, num_partitions, data) if data.protocol == "time" else None
        seed = seed_of(config.run.seed, "lists")
        tasks = [(work, p, blocks[p], catalogue, data, cuts, seed, folders) for p in partitions]
        report.built = in_order("prepare: building lists", build_drawn, tasks, data)
        if cuts and data.drift_windows:
            tasks = [(work, p, int(sizes[p]), cuts) for p in partitions]
            found = in_order("prepare: refreshed users", find_refreshed, tasks, data)
            again = refreshed_blocks(blocks, [owner for owner, *_ in found])
            tasks = [
                (
                    work,
                    p,
                    num_partitions + p,
                    int(sizes[p]),
                    again[p],
                    found[p],
                    catalogue,
                    data,
                    cuts,
                    seed,
                    folders,
                )
                for p in partitions
                if len(again[p].split)
            ]
            report.built += in_order("prepare: their lists", build_refreshed, tasks, data)
            drift = {"windows_s": list(cuts.windows_s), "refreshed_from": num_users}
            owners = [owner + block.first_id for (owner, *_), block in zip(found, blocks, strict=True)]
            user_keys = user_keys[np.concatenate([np.arange(len(user_keys)), *owners])]
    store.write("truth", truth_table(source.truth, user_keys))
    num_truth = len(user_keys) if source.truth is not None else 0
    stats = report.stats(num_users=num_users, num_items=len(item_keys), num_truth=num_truth) | drift
    stats["rows_of_users"] = len(user_keys)
    check_splits(stats["splits"])
    check_positives(config, stats)
    stats["remarks"] = remarks(
        config, stats, table["title"], report.untitled.some_absent, report.counts["items"].unwanted_ids
    )
    return stats
