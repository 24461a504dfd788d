"""N samples per user of a turn from policy r-1, or from what llm.source names, through a pool of actors.

With one turn per round these are all training and validation users (core.turn_users).

Every user has exactly N rows, or a row in `generations/failed` with the reason. Finished shards survive a kill: only
missing ones are generated again. Test users are not sampled here: no reward is ever computed for them.
"""

from __future__ import annotations

import numpy as np

from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.store.user_rows import turn_users, users_per_shard
from dpo4rec_ray.texts.accounts import cost_of, failure_reasons, generation_counts
from dpo4rec_ray.texts.sampling import ShardGenerator, text_pool
from dpo4rec_ray.texts.throughput import stream_texts
from dpo4rec_ray.workers.shards import resume_parts, shard_ranges, without

SPLITS = ("train", "valid")


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `generations` of the round."""
    section = config.generate
    takes_part = turn_users(config, round_id)
    wanted = users_per_shard(store, SPLITS, section.users_per_shard, takes_part)
    total = int(wanted.sum())
    if not total:
        raise UserError(
            f"generate: no training or validation user takes part; raise generate.user_frac = {section.user_frac:g}"
            + (", or lower run.turns_per_round" if config.run.turns_per_round > 1 else "")
        )
    ranges = shard_ranges(store.require("users").rows, section.users_per_shard)
    folder = store.path("generations", round_id)
    done = resume_parts(folder, f"{store.fingerprint} {section.users_per_shard}")
    already = int(wanted[sorted(done)].sum())
    if done:
        say(f"  generate: {already} users kept from an interrupted run")
    todo = without(ranges[wanted > 0], done)
    this_run = {}
    if len(todo):  # otherwise no engine is started
        pool = text_pool(
            config,
            store,
            ShardGenerator,
            stage="generate",
            round_id=round_id,
            policy_round=round_id - 1,
            folder=str(folder),
            samples_per_shard=section.num_samples * int(np.median(wanted[wanted > 0])),
            num_samples=dict.fromkeys(SPLITS, section.num_samples),
            takes_part=takes_part,
        )
        this_run = stream_texts("generate", "users", todo, [pool], total, already)
    counts = generation_counts(folder, wanted, section.num_samples)
    reasons = dict(failure_reasons(folder))
    if counts["failed"]:
        say(f"  generate: {counts['failed']} users without {section.num_samples} samples: {reasons}")
    if counts["failed"] == total:
        raise UserError(
            f"generate: no user got {section.num_samples} samples ({reasons}); "
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
        "failed_by_reason": reasons,
        "simulated": config.llm.source == "template",
        "this_run": this_run,
    }
    return Outcome(rows_in=total, rows_out=counts["rows"], stats=stats)
