"""Raw tables -> users, items and candidate lists (method.md section 1).

A user's events are ordered by time, ties in file order. The first ones are the knowledge history, all the LLM sees;
the later ones become candidate lists. One process and numpy: the data sets this reads today fit it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dpo4rec_ray.artifacts import RunDir
from dpo4rec_ray.config import Config
from dpo4rec_ray.core.candidates import build_lists, knowledge_cut, split_users
from dpo4rec_ray.datasets import RawTables, load_raw
from dpo4rec_ray.datasets.sample import SampleSettings
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.stages.common import Outcome, seed_of

ROW_GROUP = 1024  # users per Parquet row group: what reading one shard of users costs


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Read the dataset and write users, items, truth (empty unless it is known) and lists."""
    raw = load_raw(
        config.data.dataset,
        config.data.raw_dir,
        max_users=config.data.max_users,
        seed=config.run.seed,
        sample=SampleSettings(**config.sample.model_dump()),
    )
    for name in ("users", "items", "truth", "lists"):
        store.start(name)
    tables = _tables(config, raw)
    for name, table in tables.items():
        store.write(name, table)
    rows = {name: len(table) for name, table in tables.items()}
    labels = np.asarray(tables["lists"]["labels"].combine_chunks().flatten())
    figures = {
        **rows,
        "events": len(raw.rating),
        "positive_share": float(np.mean(labels)),
        "quarantined": raw.quarantined,
    }
    return Outcome(rows_in=len(raw.rating), rows_out=rows["lists"], figures=figures, rows=rows)


def _tables(config: Config, raw: RawTables) -> dict[str, pa.Table]:
    data, seed = config.data, config.run.seed
    num_users, num_items = len(raw.user_raw_ids), len(raw.titles)
    if num_items <= data.num_candidates:
        raise UserError(
            f"data.num_candidates = {data.num_candidates}, but the catalogue has only {num_items} items"
        )
    split, fold = split_users(
        np.arange(num_users), data.test_frac, data.valid_frac, config.reward.num_folds, seed_of(seed, "split")
    )
    # lexsort is stable, so equal timestamps keep file order
    order = np.lexsort((raw.timestamp_s, raw.user_index))
    items, ratings, times = raw.item_index[order], raw.rating[order], raw.timestamp_s[order]
    bounds = np.searchsorted(raw.user_index[order], np.arange(num_users + 1))
    histories: list[tuple[np.ndarray, np.ndarray]] = []
    rows: dict[str, list[object]] = {name: [] for name in _LIST_COLUMNS}
    for user in range(num_users):
        own = slice(bounds[user], bounds[user + 1])
        cut = knowledge_cut(own.stop - own.start, data.max_history)
        histories.append((items[own][:cut], ratings[own][:cut]))
        lists = build_lists(
            items[own],
            ratings[own],
            times[own],
            cut,
            num_items=num_items,
            block_size=data.block_size,
            num_candidates=data.num_candidates,
            positive_rating=data.positive_rating,
            history_length=data.reranker_history,
            rng=np.random.default_rng([seed_of(seed, "lists"), user]),
        )
        for one in lists:
            rows["user_id"].append(user)
            rows["split"].append(split[user])
            for name in _LIST_COLUMNS[2:]:
                rows[name].append(getattr(one, name))
    if not rows["user_id"]:
        raise UserError(
            "no candidate list could be built: every user has too few events; check data.raw_dir and max_history"
        )
    users = pa.table(
        {
            "user_id": np.arange(num_users),
            "raw_id": raw.user_raw_ids,
            "profile": raw.profiles,
            "split": pa.array([str(name) for name in split]),
            "fold": fold,
            "history_item_ids": _ragged([history[0] for history in histories], pa.int64()),
            "history_ratings": _ragged([history[1] for history in histories], pa.float32()),
        }
    )
    lists_table = pa.table(
        {
            "list_id": np.arange(len(rows["user_id"])),
            "user_id": pa.array(rows["user_id"], pa.int64()),
            "split": pa.array([str(name) for name in rows["split"]]),
            "timestamp_s": pa.array(rows["timestamp_s"], pa.int64()),
            "history_item_ids": _ragged(rows["history_item_ids"], pa.int64()),
            "history_ratings": _ragged(rows["history_ratings"], pa.float32()),
            "candidate_item_ids": _ragged(rows["candidate_item_ids"], pa.int64()),
            "labels": _ragged(rows["labels"], pa.float32()),
        }
    )
    item_table = pa.table(
        {
            "item_id": np.arange(num_items),
            "raw_id": raw.item_raw_ids,
            "title": raw.titles,
            "attributes": pa.array(raw.attributes, pa.list_(pa.string())),
        }
    )
    known = raw.truth is not None
    truth = pa.table(
        {
            "user_id": np.arange(num_users if known else 0),
            "tastes": pa.array(raw.truth if raw.truth is not None else [], pa.list_(pa.string())),
        }
    )
    return {"users": users, "items": item_table, "truth": truth, "lists": lists_table}


_LIST_COLUMNS = (
    "user_id",
    "split",
    "timestamp_s",
    "history_item_ids",
    "history_ratings",
    "candidate_item_ids",
    "labels",
)


def _ragged(rows: Sequence[object], kind: pa.DataType) -> pa.ListArray:
    """Arrays of differing length as one list column, without a Python object per value."""
    arrays = [np.asarray(row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    values = np.concatenate(arrays) if arrays else np.empty(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values).cast(kind))
