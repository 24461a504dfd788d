"""Every sample's reward, through two actor pools: the text encoder, then the reward rerankers.

The same scores also give the metrics in reward.compare, which show whether the reward can be trusted
(dpo4rec_ray/evaluation/reward_diagnosis.py). Pairs are made from reward.metric alone; with reward.personal, from the personal
reward by that metric.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.texts import EncoderSection
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.core.rewards import personal
from dpo4rec_ray.evaluation.reward_diagnosis import personal_diagnosis, reward_diagnosis
from dpo4rec_ray.evaluation.turn_figures import lines, turn_figures, user_figures, warnings
from dpo4rec_ray.rerankers.text_rewards import YARDSTICK, SampleRewards
from dpo4rec_ray.storage.parquet import dataset, read_files, read_parquet
from dpo4rec_ray.store.artifacts import RunDir, part_file
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import Progress, say
from dpo4rec_ray.store.reading import sample_scorer
from dpo4rec_ray.store.user_rows import pooled_parts, turn_users, valid_users
from dpo4rec_ray.texts.vectors import encoder_pool, open_encoder
from dpo4rec_ray.workers.phases import READY, phase
from dpo4rec_ray.workers.run_metrics import Metrics
from dpo4rec_ray.workers.shards import Pool, Row, part_number, run_shards
from dpo4rec_ray.workers.stage_workers import SCORER_KEYS

# Other users that a watched user's texts are tried on, where reward.personal asks for none (evaluation.turn_figures).
WATCHED_OTHERS = 12


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `scores` and `metric_scores` of the round, one part of each per part of `generations`."""
    store.start("metric_scores", round_id)
    store.start("scores", round_id)
    shards = [(part_number(file), 0, 0) for file in store.files("generations", round_id)]
    generated = store.require("generations", round_id)
    encoders = encoder_pool(config, ShardEncoder, folder=str(store.path("generations", round_id)))
    pools = [encoders, scorer_pool(config, store, round_id)]
    num_users = generated.stats["users"]
    progress = Progress("score", num_users, "users")
    rows = sum(answer["rows"] for answer in run_shards(shards, pools, progress))
    valid = valid_users(store)
    stats = reward_diagnosis(_pooled(store, "metric_scores", round_id, num_users), reward_name(config), valid)
    if config.reward.personal:
        stats["personal"] = personal_diagnosis(_pooled(store, "scores", round_id, num_users))
    _say(stats)
    first = config.run.first_turn(round_id)
    if round_id > first:
        watched = valid[turn_users(config, round_id).watches(valid)]
        before, now = (_of_users(store, one, watched) for one in (first, round_id))
        stats["watched"] = turn_figures(before, now)
        stats["warnings"] = list(warnings(stats["watched"]))
        for line in (*lines(stats["watched"]), *stats["warnings"]):
            say(f"  turn {round_id}: {line}")
    metric_rows = rows * len(stats["metrics"])
    return Outcome(rows_in=generated.rows, rows_out=rows, stats=stats, rows={"metric_scores": metric_rows})


def _of_users(store: RunDir, turn: int, users: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`user_figures` of some users in a turn, whose scores may have no manifest yet."""
    columns = {
        "scores": ["user_id", "sample_id", "plain_reward", "others_reward"],
        "generations": ["user_id", "sample_id", "text"],
    }
    tables = (
        dataset(sorted(store.path(name, turn).glob("part-*.parquet"))).to_table(
            own, filter=pc.field("user_id").isin(users)
        )
        for name, own in columns.items()
    )
    return user_figures(*tables, users)


def scorer_pool(config: Config, store: RunDir, round_id: int) -> Pool:
    """The pool that scores what the encoders send it."""
    section = config.reward
    return Pool(
        ShardScorer,
        {"config": config, "store": store, "round_id": round_id},
        section.num_scorers,
        section.cpus_per_scorer,
        num_gpus=section.gpus_per_worker,
        where=section,
        what="scorers",
        keys=SCORER_KEYS,
    )


def _pooled(store: RunDir, name: str, round_id: int, num_users: int) -> pa.Table:
    """What figures over all users are made from (`pooled_parts`), of an artifact that has no manifest yet."""
    return read_files(pooled_parts(sorted(store.path(name, round_id).glob("part-*.parquet")), num_users))


def metric_names(config: Config) -> tuple[str, ...]:
    """The metric of the reward, those in reward.compare, and the one that judges them all."""
    return tuple(dict.fromkeys((config.reward.metric, *config.reward.compare, YARDSTICK)))


def reward_name(config: Config) -> str:
    """The name in `metric_scores` of what pairs are made from."""
    return f"personal {config.reward.metric}" if config.reward.personal else config.reward.metric


def _say(stats: dict[str, Any]) -> None:
    """One line per metric: how often its best sample is tied, and what its choice is worth on other lists."""
    if "personal" in stats:
        found = stats["personal"]
        nobody = found["users_without_others"]
        say(
            f"  personal reward: within users its rank correlation is {found['agreement_with_plain']:+.2f} with the plain reward "
            f"and {found['agreement_with_others']:+.2f} with what the texts are worth to other users "
            f"(the plain reward: {found['plain_with_others']:+.2f})"
            + (f"; {nobody} users have nobody to compare with" if nobody else "")
        )
    if not stats["users_in_carry_over"]:
        say("  carry-over: unknown, because no user has two lists with a positive")
        return
    width = max(16, *map(len, stats["metrics"]))
    for number, (name, row) in enumerate(stats["metrics"].items()):
        low, high = row["yardstick_gap_ci95"]
        say(
            f"  {'reward' if not number else 'compared'} {name:<{width}} best tied for {row['best tied']:>6.1%} of users; "
            f"{row['carried']:>6.1%} of its best-worst gap carries over; NDCG@5 gap on other lists "
            f"{row['yardstick_gap']:+.4f} [{low:+.4f}, {high:+.4f}]"
        )


class ShardEncoder:
    """Reads one part of `generations` and encodes its texts."""

    def __init__(self, encoder: EncoderSection, folder: str):
        self._encoder = open_encoder(encoder)
        self._folder = folder

    def __call__(self, row: Row) -> Row:
        file = part_file(self._folder, int(row["shard"]))
        table = read_parquet(file, columns=["user_id", "sample_id", "text"])
        vectors = self._encoder.encode(table["text"].to_pylist())
        return {
            "shard": int(row["shard"]),
            "user_ids": table["user_id"].to_numpy(),
            "sample_ids": table["sample_id"].to_numpy(),
            "vectors": vectors,
        }


class ShardScorer:
    """Scores a shard's vectors and commits them as one part of `metric_scores` and one of `scores`."""

    def __init__(self, config: Config, store: RunDir, round_id: int):
        self._num_others, self._seed = config.reward.personal, seed_of(config.run.seed, "others")
        self._watched = np.zeros(0, np.int64)
        if config.run.turns_per_round > 1 and not self._num_others:
            valid = valid_users(store)
            self._watched = valid[turn_users(config, round_id).watches(valid)]
        self._reward_name = reward_name(config)
        phase("loading the rerankers")
        self._scorer = sample_scorer(config, store, metric_names(config), config.run.reward_of(round_id))
        phase(READY)
        self._store, self._round = store, round_id
        self._metrics = Metrics(config.run.name, "score", round_id)

    def __call__(self, row: Row) -> Row:
        user_ids = np.asarray(row["user_ids"], np.int64)
        vectors = np.asarray(row["vectors"], np.float32)
        found = self._scorer.rewards(user_ids, vectors)
        plain, others = found.reward[:, 0], np.full(len(user_ids), np.nan)
        if self._num_others:
            worth = self._scorer.rewards_of_others(
                user_ids, vectors, self._num_others, self._seed, metrics=found.metrics[:1]
            )
            others = worth.reward[:, 0]
            found = _with_personal(found, worth, self._reward_name)
        elif (watched := np.isin(user_ids, self._watched)).any():
            worth = self._scorer.rewards_of_others(
                user_ids[watched], vectors[watched], WATCHED_OTHERS, self._seed, metrics=found.metrics[:1]
            )
            others[watched] = worth.reward[:, 0]
        ids = {
            "round": np.full(len(user_ids), self._round, np.int32),
            "user_id": user_ids,
            "sample_id": np.asarray(row["sample_ids"], np.int32),
        }
        scores = {
            **ids,
            "reward": found.reward[:, 0],
            "plain_reward": plain,
            "others_reward": others,
            "std_error": found.std_error[:, 0],
            "num_lists": found.num_lists,
        }
        count = len(found.metrics)
        by_metric = {
            **{name: np.repeat(values, count) for name, values in ids.items()},
            "metric": list(found.metrics) * len(user_ids),
            "num_lists": np.repeat(found.num_lists, count),
            **{name: getattr(found, name).ravel() for name in ("reward", "std_error", "half_a", "half_b")},
        }
        part = int(row["shard"])
        self._store.write("metric_scores", pa.table(by_metric), self._round, part)
        self._store.write("scores", pa.table(scores), self._round, part)
        self._metrics.count("dpo4rec_rewards", len(user_ids))
        return {"shard": part, "rows": len(user_ids), "users": len(np.unique(user_ids))}


def _with_personal(found: SampleRewards, worth: SampleRewards, name: str) -> SampleRewards:
    """The rewards with the personal reward by their first metric before them.

    A half of the user's lists goes with a half of the other users: what the halves share would carry over though it is luck.
    """
    pairs = [
        (getattr(found, half)[:, 0], getattr(worth, half)[:, 0]) for half in ("reward", "half_a", "half_b")
    ]
    # The user's lists and those of the others are drawn apart, so the squares of the errors add up.
    error = np.hypot(found.std_error[:, 0], worth.std_error[:, 0])
    first = [*(personal(*pair) for pair in pairs), error]
    rest = (found.reward, found.half_a, found.half_b, found.std_error)
    reward, half_a, half_b, std_error = map(np.column_stack, zip(first, rest, strict=True))
    return SampleRewards((name, *found.metrics), reward, half_a, half_b, std_error, found.num_lists)
