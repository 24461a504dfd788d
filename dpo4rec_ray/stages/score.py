"""Every sample's reward, through two actor pools: the text encoder, then the reward rerankers.

Also measured here, because it needs rewards per half of a user's lists: how much of the best-worst gap carries over to
lists that were not used for choosing (method.md section 4). A reward that does not carry over teaches nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo4rec_ray.artifacts import RunDir, write_part
from dpo4rec_ray.config import Config
from dpo4rec_ray.core.metrics import paired_bootstrap
from dpo4rec_ray.core.rewards import carry_over
from dpo4rec_ray.knowledge.encoder import TextEncoder
from dpo4rec_ray.stages.common import WORKER_ENV, Outcome, Progress, say
from dpo4rec_ray.stages.encode import encoder_pool
from dpo4rec_ray.stages.reading import sample_scorer
from dpo4rec_ray.stages.shards import Pool, Row, part_number, run_shards


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `scores` of the round, one part per part of `generations`."""
    folder = store.start("scores", round_id)
    shards = [(part_number(file), 0, 0) for file in store.files("generations", round_id)]
    num_users = store.require("generations", round_id).figures["users"]
    scorer = Pool(
        ShardScorer,
        {"config": config, "store": store, "folder": str(folder), "round_id": round_id},
        config.reward.num_scorers,
        config.reward.cpus_per_scorer,
        num_gpus=config.reward.gpus_per_worker,
        env=WORKER_ENV,
    )
    pools = [encoder_pool(config, ShardEncoder, folder=str(store.path("generations", round_id))), scorer]
    answers = run_shards(shards, pools, Progress("score", num_users, "users"))
    rows = sum(answer["rows"] for answer in answers)
    figures = carry_over_figures(
        pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])
    )
    if figures["users_in_carry_over"]:
        low, high = figures["gap_held_out_ci95"]
        say(
            f"  carry-over: best-worst gap {figures['gap_in_sample']:.4f} where it was chosen, "
            f"{figures['gap_held_out']:.4f} [{low:.4f}, {high:.4f}] on the user's other lists"
        )
    else:
        say("  carry-over: unknown, no user has two lists with a positive")
    return Outcome(rows_in=store.require("generations", round_id).rows, rows_out=rows, figures=figures)


class ShardEncoder:
    """Reads one part of `generations` and encodes its texts."""

    def __init__(self, folder: str, **encoder: Any):
        self._encoder = TextEncoder(**encoder)
        self._folder = folder

    def __call__(self, row: Row) -> Row:
        file = f"{self._folder}/part-{int(row['shard']):05d}.parquet"
        table = pq.read_table(file, columns=["user_id", "sample_id", "text"])
        vectors = self._encoder.encode(table["text"].to_pylist())
        return {
            "shard": int(row["shard"]),
            "user_ids": table["user_id"].to_numpy(),
            "sample_ids": table["sample_id"].to_numpy(),
            "vectors": vectors,
        }


class ShardScorer:
    """Scores a shard's vectors and commits them as one part of `scores`."""

    def __init__(self, config: Config, store: RunDir, folder: str, round_id: int):
        self._scorer = sample_scorer(config, store)
        self._folder, self._round = folder, round_id

    def __call__(self, row: Row) -> Row:
        user_ids = np.asarray(row["user_ids"], np.int64)
        found = self._scorer.rewards(user_ids, np.asarray(row["vectors"], np.float32))
        table = pa.table(
            {
                "round": np.full(len(user_ids), self._round, np.int32),
                "user_id": user_ids,
                "sample_id": np.asarray(row["sample_ids"], np.int32),
                "reward": found.reward.astype(np.float32),
                "num_lists": found.num_lists.astype(np.int32),
                "half_a": found.half_a.astype(np.float32),
                "half_b": found.half_b.astype(np.float32),
            }
        )
        write_part(self._folder, "scores", table, int(row["shard"]))
        return {"shard": int(row["shard"]), "rows": len(user_ids), "users": len(np.unique(user_ids))}


def carry_over_figures(scores: pa.Table) -> dict[str, Any]:
    """Spread and carry-over of the rewards within a user, over all scored users."""
    scores = scores.sort_by([("user_id", "ascending"), ("sample_id", "ascending")])
    users, counts = np.unique(scores["user_id"].to_numpy(), return_counts=True)
    matrix = {
        name: scores[name].to_numpy().astype(np.float64).reshape(len(users), counts[0])
        for name in ("reward", "half_a", "half_b")
    }
    found = carry_over(matrix["half_a"], matrix["half_b"])
    numbers = np.arange(len(found.gap_held_out))
    figures: dict[str, Any] = {
        "mean_reward": float(np.nanmean(matrix["reward"])),
        "spread": float(np.nanmean(np.nanstd(matrix["reward"], axis=1))),
        "users_in_carry_over": len(numbers),
    }
    if not len(numbers):  # no user has two lists with a positive
        return figures | dict.fromkeys(
            ("gap_in_sample", "gap_held_out", "gap_held_out_ci95", "rank_correlation")
        )
    in_sample = paired_bootstrap(found.gap_in_sample, numbers)
    held_out = paired_bootstrap(found.gap_held_out, numbers)
    return figures | {
        "gap_in_sample": in_sample.mean,
        "gap_held_out": held_out.mean,
        "gap_held_out_ci95": [held_out.low, held_out.high],
        "rank_correlation": float(np.nanmean(found.rank_correlation)),
    }
