"""Every user's N texts with their rewards, for the learners that read them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.groups import Group
from dpo4rec_ray.policy.rows import ArrowRows, group_lengths
from dpo4rec_ray.storage.parquet import read_parquet
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.artifacts import Manifest
from dpo4rec_ray.train.policy_task import Material, PolicyTask, TextSource
from dpo4rec_ray.train.reference_logps import read_reference

ARTIFACTS = ("scores", "generations")
_ORDER = [("user_id", "ascending"), ("sample_id", "ascending")]
_TEXTS = pa.list_(pa.list_(pa.int32()))
# Log-probabilities of the texts' tokens, where there are any: of the policy that drew them, the reference, and the engine.
LOGPS = ("sampler_logps", "reference_logps", "engine_logps")
_LOGPS = pa.list_(pa.list_(pa.float32()))
_SCORED = pa.schema(
    [
        ("user_id", pa.int64()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("completions", _TEXTS),
        ("rewards", pa.list_(pa.float64())),
    ]
)
# Users whose texts are Python lists at the same time.
AT_ONCE = 256
ScoredUser = dict[str, Any]  # a row of `groups_of`, with those of LOGPS that there are
# A user with the texts that fit -> the row to train on, without its prompt; None: there is none.
MakeRow = Callable[[ScoredUser], dict[str, Any] | None]


def groups_of(files: Sequence[Place], *, engine: bool = False) -> pa.Table:
    """user_id, prompt_token_ids, completions [N], rewards [N] of the users of one part, by user.

    Args:
        files: the part of `scores` and that of `generations`. A user whose reward is unknown (no list with a positive) is left
            out.
        engine: engine_logps too, the engine's log-probabilities.

    Raises:
        ValueError: the two parts hold different users.
    """
    scores, generations = files
    columns = ["user_id", "sample_id", "prompt_token_ids", "token_ids", *(["token_logps"] if engine else [])]
    texts = read_parquet(generations).select(columns).sort_by(_ORDER).combine_chunks()
    scored = read_parquet(scores).select(["user_id", "sample_id", "reward"]).sort_by(_ORDER).combine_chunks()
    if not texts["user_id"].equals(scored["user_id"]):
        raise ValueError(f"{scores} and {generations} hold different users")
    users, starts = np.unique(texts["user_id"].to_numpy(), return_index=True)
    rewards = scored["reward"].to_numpy().astype(np.float64)
    ends = pa.array([*starts, len(rewards)], pa.int32())

    def per_user(values: pa.ChunkedArray | pa.Array) -> pa.Array:
        one = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        return pa.ListArray.from_arrays(ends, one)

    columns = {
        "user_id": users,
        "prompt_token_ids": texts["prompt_token_ids"].take(pa.array(starts)),
        "completions": per_user(texts["token_ids"]),
        "rewards": per_user(pa.array(rewards)),
    }
    schema = _SCORED
    if engine:
        columns["engine_logps"] = per_user(texts["token_logps"])
        schema = schema.append(pa.field("engine_logps", _LOGPS))
    known = np.array([not np.isnan(own).any() for own in np.split(rewards, starts[1:])], bool)
    return pa.table(columns).cast(schema).filter(pa.array(known[: len(users)]))


class AllTexts(TextSource):
    """All texts of users with rewards."""

    artifacts, schema, per_token, unit = ARTIFACTS, "token_logps", True, "users"

    def total(self, manifests: Sequence[Manifest]) -> int:
        return int(manifests[1].stats["users"])

    def read(self, files: Sequence[Place]) -> tuple[pa.Array, list[Group]]:
        table = groups_of(files)
        groups = zip(table["prompt_token_ids"].to_pylist(), table["completions"].to_pylist(), strict=True)
        return table["user_id"], [Group(*one) for one in groups]

    def table(self, users: pa.Array, logps: list[list[list[float]]]) -> pa.Table:
        return pa.table({"user_id": users, "logps": pa.array(logps, _LOGPS)})


def material(
    task: PolicyTask,
    make: MakeRow,
    without: str,
    nobody: str,
    stored: Mapping[str, str | None] = MappingProxyType({}),
    engine: str | None = None,
) -> Material:
    """What a learner trains on and is evaluated on: `make` of every training user, and of held-out ones.

    A text that is too long to train on (`Config.max_training_tokens`) is none for `make`.

    Args:
        without: the name by which users without a row are counted.
        nobody: what is said where no training user has a row.
        stored: one of LOGPS -> folder of stored log-probabilities, or None.
        engine: as which of LOGPS the engine's log-probabilities are read; None: they are not.

    Raises:
        UserError: no training user has a row.
    """
    tables, counts = {}, {}
    for split, scored in _by_split(task, stored, engine).items():
        parts, told = [], {"too_long": 0, without: 0}
        for batch in scored.to_batches(max_chunksize=AT_ONCE):
            rows = []
            for user in batch.to_pylist():
                fitting, dropped = _fitting(user, task.config.max_training_tokens)
                told["too_long"] += dropped
                row = make(fitting) if fitting["completions"] else None
                told[without] += row is None
                if row is not None:
                    rows.append({"prompt_token_ids": user["prompt_token_ids"], **row})
            if rows:
                parts.append(pa.Table.from_pylist(rows))
        tables[split] = pa.concat_tables(parts) if parts else None
        num_rows = len(tables[split]) if parts else 0
        counts |= {split: num_rows, **{f"{split}_{name}": count for name, count in told.items()}}
    train, valid = tables["train"], tables["valid"]
    if train is None:
        raise UserError(f"{task.config.run.called(task.round_id)}: {nobody} ({counts})")
    return Material(
        ArrowRows(train),
        group_lengths(train),
        {"users": [] if valid is None else ArrowRows(valid)},
        {"users": counts["train"]},
        counts,
    )


def _fitting(user: ScoredUser, max_length: int) -> tuple[ScoredUser, int]:
    """The user with those texts alone that fit beside the prompt, and how many do not."""
    room = max_length - len(user["prompt_token_ids"])
    fits = [place for place, text in enumerate(user["completions"]) if len(text) <= room]
    dropped = len(user["completions"]) - len(fits)
    per_text = [name for name in ("completions", "rewards", *LOGPS) if name in user]
    return user | {name: [user[name][place] for place in fits] for name in per_text}, dropped


def _by_split(task: PolicyTask, stored: Mapping[str, str | None], engine: str | None) -> dict[str, pa.Table]:
    """Users with rewards by split, with the log-probabilities that are stored; of validation users those evaluated on."""
    store, config = task.store, task.config
    parts = zip(*(store.files(name, task.round_id) for name in ARTIFACTS), strict=True)
    table = pa.concat_tables([groups_of(files, engine=engine is not None) for files in parts])
    if engine:
        table = table.rename_columns({"engine_logps": engine})
    for name, folder in stored.items():
        if folder:
            logps = read_reference(folder)
            if not logps["user_id"].equals(table["user_id"]):
                raise ValueError(f"{folder}: the stored log-probabilities belong to other texts")
            table = table.append_column(name, logps["logps"])
    users = store.read("users", split=("train", "valid"), columns=["user_id", "split"])
    held_out = users["user_id"].filter(pc.equal(users["split"], "valid")).to_numpy()
    own = table["user_id"].to_numpy()
    is_valid = np.isin(own, held_out)
    is_read = is_valid & ~np.isin(own, unread_users(config, own[is_valid]))
    return {"train": table.filter(pa.array(~is_valid)), "valid": table.filter(pa.array(is_read))}


def unread_users(config: Config, held_out: np.ndarray) -> np.ndarray:
    """Those beyond `policy.max_heldout_users` of the validation users that a turn has sampled, drawn by the run's seed."""
    most = config.policy.max_heldout_users
    if not most or len(held_out) <= most:
        return held_out[:0]
    rng = np.random.default_rng(seed_of(config.run.seed, "held-out pairs"))
    return rng.permutation(np.sort(held_out))[most:]
