"""N samples per training and validation user from policy r-1, or from what llm.source names, through a pool of actors.

Exactly N rows per user, or a row in `generations/failed` with the reason. Finished shards survive a kill: only missing
ones are generated again. Test users are not sampled here: no reward is ever computed for them.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import random_share
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.artifacts import RunDir, part_notes
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import Progress, say
from dpo4rec_ray.store.reading import users_per_shard
from dpo4rec_ray.texts.sampling import ShardGenerator, engine_pool
from dpo4rec_ray.texts.sources import cost_of
from dpo4rec_ray.texts.throughput import Throughput
from dpo4rec_ray.workers.shards import begin_shards, finished_shards, part_number, run_shards, shard_ranges

SPLITS = ("train", "valid")


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `generations` of the round."""
    section = config.generate
    takes_part = partial(random_share, seed=config.run.seed, share=section.user_frac)
    wanted = users_per_shard(store, SPLITS, section.users_per_shard, takes_part)
    total = int(wanted.sum())
    if not total:
        raise UserError(
            f"generate: no training or validation user takes part; raise generate.user_frac = {section.user_frac:g}"
        )
    ranges = shard_ranges(store.require("users").rows, section.users_per_shard)
    folder = store.path("generations", round_id)
    fingerprint = f"{store.fingerprint} {section.users_per_shard}"
    done = finished_shards(folder, fingerprint)
    store.start("generations", round_id, keep=bool(done))
    begin_shards(folder, fingerprint)
    already = int(wanted[sorted(done)].sum())
    if done:
        say(f"  generate: {already} users kept from an interrupted run")
    todo = [(shard, *ranges[shard]) for shard in np.flatnonzero(wanted).tolist() if shard not in done]
    throughput = Throughput(section.num_engines)

    def extra(answer: dict[str, object]) -> str:
        throughput.add(answer)
        return throughput.line

    if todo:  # else no engine is needed
        pool = engine_pool(
            config,
            store,
            ShardGenerator,
            round_id - 1,
            "generate",
            folder=str(folder),
            samples_per_shard=section.num_samples * int(np.median(wanted[wanted > 0])),
            num_samples=dict.fromkeys(SPLITS, section.num_samples),
            round_id=round_id,
            takes_part=takes_part,
        )
        progress = Progress("generate", total, "users", already=already)
        for _ in run_shards(todo, [pool], progress, already=already, extra=extra):
            pass
    counts = _account(folder, wanted, section.num_samples)
    reasons = _reasons(folder)
    if counts["failed"]:
        say(f"  generate: {counts['failed']} users without {section.num_samples} samples: {dict(reasons)}")
    if counts["failed"] == total:
        raise UserError(
            f"generate: no user got {section.num_samples} samples ({dict(reasons)}); "
            + (
                "give texts.users that many rows per user, or set run.num_rounds = 0"
                if config.llm.source == "table"
                else "raise llm.max_model_len, lower data.max_history or check the LLM"
            )
        )
    if counts["shortened"]:
        say(
            f"  generate: {counts['shortened']} prompts leave out their oldest events to fit llm.max_model_len"
        )
    stats = {
        **counts,
        **cost_of(config, counts),
        "users": total - counts["failed"],
        "failed_by_reason": dict(reasons),
        "simulated": config.llm.source == "template",
        "this_run": throughput.stats,
    }
    return Outcome(rows_in=total, rows_out=counts["rows"], stats=stats)


def _reasons(folder: Path) -> Counter[str]:
    """How many failed for each reason, from an artifact's folder `failed`."""
    reasons: Counter[str] = Counter()
    for file in sorted((folder / "failed").glob("*.parquet")):
        reasons.update(pq.read_table(file, columns=["reason"])["reason"].to_pylist())
    return reasons


def _account(folder: Path, wanted: np.ndarray, num_samples: int) -> Counter[str]:
    """Counts over all parts, from their footers. Every user has exactly N rows or a reason; else it is our own mistake."""
    counts: Counter[str] = Counter()
    seen = np.zeros_like(wanted)
    for file in sorted(folder.glob("part-*.parquet")):
        rows, notes = part_notes(file)
        assert rows == num_samples * (notes["users"] - notes["failed"]), f"{file}: {rows} rows, {notes}"
        seen[part_number(file)] = notes["users"]
        counts.update({"rows": rows, **notes})
    assert np.array_equal(seen, wanted), (
        f"shards without all their users: {np.flatnonzero(seen != wanted)[:5]}"
    )
    return counts
