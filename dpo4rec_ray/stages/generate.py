"""N samples per training and validation user from policy r-1, or from what llm.source names, through a pool of actors.

Exactly N rows per user, or the user is listed with a reason. Finished shards survive a kill: only missing ones are
generated again. Test users are not sampled here: no reward is ever computed for them.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from dpo4rec_ray.artifacts import RunDir
from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import random_share
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.stages.common import Outcome, Progress, say
from dpo4rec_ray.stages.sampling import ShardGenerator, engine_pool
from dpo4rec_ray.stages.shards import begin_shards, finished_shards, run_shards, shard_ranges

SPLITS = ("train", "valid")


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `generations` of the round."""
    takes_part = partial(random_share, seed=config.run.seed, share=config.generate.user_frac)
    ids = store.read("users", split=SPLITS, columns=["user_id"])["user_id"].to_numpy()
    users: list[int] = ids[takes_part(ids)].tolist()
    ranges = shard_ranges(store.require("users").rows, config.generate.users_per_shard)
    folder = store.path("generations", round_id)
    done = finished_shards(folder, store.mark)
    store.start("generations", round_id, keep=bool(done))
    begin_shards(folder, store.mark)
    already = sum(user // config.generate.users_per_shard in done for user in users)
    if done:
        say(f"  generate: {already} users kept from an interrupted run")
    todo = [(shard, low, high) for shard, (low, high) in enumerate(ranges) if shard not in done]
    num_samples = dict.fromkeys(SPLITS, config.generate.num_samples)
    pool = engine_pool(
        config,
        store,
        ShardGenerator,
        round_id - 1,
        num_samples,
        "generate",
        folder=str(folder),
        round_id=round_id,
        takes_part=takes_part,
    )
    progress = Progress("generate", len(users), "users", already=already)
    answers = run_shards(todo, [pool], progress, already=already)
    rows, failed = _account(folder)
    _check_complete(users, rows, failed, config.generate.num_samples)
    reasons = dict(Counter(failed.values()))
    if failed:
        say(f"  generate: {len(failed)} users without {config.generate.num_samples} samples: {reasons}")
    if not rows:
        raise UserError(
            f"generate: no user got {config.generate.num_samples} samples ({reasons}); "
            "raise llm.max_model_len, lower data.max_history or check the LLM"
        )
    figures = {
        "users": len(rows),
        "tokens_this_run": sum(answer["tokens"] for answer in answers),
        "clipped_this_run": sum(answer["clipped"] for answer in answers),
        "failed": failed,
        "failed_by_reason": reasons,
    }
    return Outcome(rows_in=len(users), rows_out=sum(rows.values()), figures=figures)


def _account(folder: Path) -> tuple[Counter[int], dict[str, str]]:
    """Rows per user and reasons per failed user, over all parts on disk."""
    rows: Counter[int] = Counter()
    for file in sorted(folder.glob("part-*.parquet")):
        rows.update(pq.read_table(file, columns=["user_id"])["user_id"].to_pylist())
    failed: dict[str, str] = {}
    for file in sorted(folder.glob("failed-*.json")):
        failed |= json.loads(file.read_text(encoding="utf-8"))
    return rows, failed


def _check_complete(users: list[int], rows: Counter[int], failed: dict[str, str], num_samples: int) -> None:
    """Every user has exactly N rows or a reason; anything else is our own mistake."""
    wrong = [user for user in users if rows[user] != (0 if str(user) in failed else num_samples)]
    assert not wrong, f"users without {num_samples} rows and without a reason: {wrong[:5]}"
    assert not set(rows) - set(users), "rows for users that were not asked for"
