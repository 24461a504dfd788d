"""Every user's N texts with their rewards, for the learners that read them all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.policy.groups import Group
from dpo4rec_ray.storage.parquet import read_parquet
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.train.policy_task import TextSource

_ORDER = [("user_id", "ascending"), ("sample_id", "ascending")]
ARTIFACTS = ("generations", "scores")


def groups_of(files: Sequence[Place]) -> pa.Table:
    """user_id, prompt_token_ids, completions [N], rewards [N] of the users of one part, by user.

    files: the part of `generations` and that of `scores`. A user whose reward is unknown (no list with a positive) is left out.

    Raises:
        ValueError: the two parts hold different users.
    """
    generations, scores = files
    columns = ["user_id", "sample_id", "prompt_token_ids", "token_ids"]
    texts = read_parquet(generations).select(columns).sort_by(_ORDER).combine_chunks()
    scored = read_parquet(scores).select(["user_id", "sample_id", "reward"]).sort_by(_ORDER).combine_chunks()
    if not texts["user_id"].equals(scored["user_id"]):
        raise ValueError(f"{scores} and {generations} hold different users")
    users, starts, counts = np.unique(texts["user_id"].to_numpy(), return_index=True, return_counts=True)
    rewards = scored["reward"].to_numpy()
    rows = []
    for user, start, count in zip(users.tolist(), starts.tolist(), counts.tolist(), strict=True):
        own = rewards[start : start + count]
        if not np.isnan(own).any():
            rows.append(
                {
                    "user_id": user,
                    "prompt_token_ids": texts["prompt_token_ids"][start].as_py(),
                    "completions": texts["token_ids"].slice(start, count).to_pylist(),
                    "rewards": own.astype(np.float64).tolist(),
                }
            )
    return pa.Table.from_pylist(rows, SCHEMA)


SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("completions", pa.list_(pa.list_(pa.int32()))),
        ("rewards", pa.list_(pa.float64())),
    ]
)


def scored_groups(config: Config, store: RunDir, round_id: int) -> dict[str, pa.Table]:
    """`groups_of` all parts by split, with the validation users that training is evaluated on, drawn by the run's seed."""
    parts = zip(*(store.files(name, round_id) for name in ARTIFACTS), strict=True)
    table = pa.concat_tables([groups_of(files) for files in parts])
    users = store.read("users", split=("train", "valid"), columns=["user_id", "split"])
    held_out = pc.equal(users["split"], "valid")
    unread = unread_users(config, users["user_id"].filter(held_out).to_numpy())
    valid = np.setdiff1d(users["user_id"].filter(held_out).to_numpy(), unread)
    train = users["user_id"].filter(pc.invert(held_out)).to_numpy()
    own = table["user_id"].to_numpy()
    return {
        "train": table.filter(pa.array(np.isin(own, train))),
        "valid": table.filter(pa.array(np.isin(own, valid))),
    }


def unread_users(config: Config, held_out: np.ndarray) -> np.ndarray:
    """Validation users beyond `policy.max_heldout_users`."""
    most = config.policy.max_heldout_users
    if not most or len(held_out) <= most:
        return held_out[:0]
    rng = np.random.default_rng(seed_of(config.run.seed, "held-out pairs"))
    return rng.permutation(np.sort(held_out))[most:]


class AllTexts(TextSource):
    """All texts of users with rewards."""

    artifacts, schema, per_token, unit = ARTIFACTS, "token_logps", True, "users"

    def total(self, manifest: Manifest) -> int:
        return int(manifest.stats["users"])

    def read(self, files: Sequence[Place]) -> tuple[pa.Array, list[Group]]:
        table = groups_of(files)
        groups = zip(table["prompt_token_ids"].to_pylist(), table["completions"].to_pylist(), strict=True)
        return table["user_id"], [Group(*one) for one in groups]

    def table(self, users: pa.Array, logps: list[list[list[float]]]) -> pa.Table:
        return pa.table({"user_id": users, "logps": pa.array(logps, pa.list_(pa.list_(pa.float32())))})
