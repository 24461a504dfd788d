"""The benchmark of the stage `score`: rewards of 1,000 users x 10 texts x 10 lists, against a plain loop over lists.

Every backbone is measured by a process of its own, python benchmarks/score.py FOLDER [--backbone prm] [--users 1000], which
prints one JSON line. The texts are counted from the histories of the sample world (no LLM is needed), the rerankers are
trained for one epoch: neither changes how long scoring takes. One thread each. The peer scores one list after the other
with the same model, as a first version would be written, on some of the users; both must find the same rewards.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import logging
import math
import pstats
import sys
import time
from pathlib import Path

import harness
import numpy as np
import pyarrow.parquet as pq
import torch
from harness import ROOT, Row

from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.evaluation.systems import METRIC_NAMES
from dpo4rec_ray.knowledge.encoder import TextEncoder
from dpo4rec_ray.rerankers import Reranker
from dpo4rec_ray.rerankers.catalogue import Catalogue
from dpo4rec_ray.rerankers.fit import ListData, load_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.rerankers.text_rewards import SampleScorer
from dpo4rec_ray.running import Selection, run_pipeline
from dpo4rec_ray.stages.score import ShardEncoder, ShardScorer, metric_names
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.reading import read_catalogue, read_list_data

SAMPLES, LISTS = 10, 10  # per user, and per user
PEER_USERS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbones", default="dlcm,prm,setrank,mir")
    parser.add_argument("--users", type=int, default=1000)


def run(options: argparse.Namespace, folder: Path) -> int:
    """One process per backbone; each checks that loop and stage find the same rewards."""
    found: list[Row] = []
    for backbone in options.backbones.split(","):
        command = ["benchmarks/score.py", str(folder / "score"), "--backbone", backbone]
        _, peaks, answer = harness.watched([*command, "--users", str(options.users)])
        found.append({**answer, "peak_mib": round(peaks.tree_mib)})
    harness.print_table(
        found,
        "backbone {backbone} | lists {lists:,} | lists/s {ours_lists_per_s:,} | loop, lists/s {loop_lists_per_s:,} | "
        "ratio {ratio} | stage s {stage_s} | in the encoder {encoder_s} | in the forward pass {forward_s} | "
        "of the stage {share in encoder and forward:.1%} | 20 metrics of 100,000 lists, s {metrics_s} | peak MiB {peak_mib:,}",
    )
    harness.write_results(folder / "score.json", found)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/score.py", description="Measure rewards against a plain loop."
    )
    parser.add_argument("folder")
    parser.add_argument("--backbone", default="prm")
    parser.add_argument("--users", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(
        ROOT / "jobs/recipes/demo.toml",
        [
            "llm.source=statistics",
            f"run.root={options.folder}",
            f"run.name={options.backbone}",
            f"sample.num_users={math.ceil(options.users / 0.85)}",  # a tenth is for evaluation alone
            "data.max_history=4",
            "data.block_size=1",  # short blocks give a user ten lists
            f"generate.num_samples={SAMPLES}",
            "reward.num_folds=1",
            f"reranker.backbone={options.backbone}",
            "reranker.epochs=1",
        ],
    )
    store = RunDir(Path(options.folder) / options.backbone)
    make_inputs(config, store)
    catalogue = read_catalogue(store)
    model = load_reranker(store.path("reward") / "fold-0", catalogue)
    lists, users = ten_lists(read_list_data(store, ("train", "valid")), options.users)
    user_ids, vectors = encoded(config, store, users)
    scorer = SampleScorer(
        [ListScorer([model], catalogue)],
        lists,
        np.zeros(int(lists.user_ids.max()) + 1, np.int64),
        num_items=catalogue.shape.num_items,
        metrics=["ndcg@5"],
        num_redraws=0,
        seed=0,
    )
    began = time.perf_counter()
    ours = scorer.rewards(user_ids, vectors).reward[:, 0]
    ours_s = time.perf_counter() - began
    few = np.isin(user_ids, users[:PEER_USERS])
    began = time.perf_counter()
    theirs = plain_loop(model, catalogue, lists, user_ids[few], vectors[few])
    loop_s = time.perf_counter() - began
    worst = float(np.abs(ours[few] - theirs).max())
    num_lists, peer_lists = len(user_ids) * LISTS, int(few.sum()) * LISTS
    answer = {
        "backbone": options.backbone,
        "lists": num_lists,
        "ours_s": round(ours_s, 2),
        "ours_lists_per_s": round(num_lists / ours_s),
        "loop_lists": peer_lists,
        "loop_s": round(loop_s, 2),
        "loop_lists_per_s": round(peer_lists / loop_s),
        "ratio": round((num_lists / ours_s) / (peer_lists / loop_s), 1),
        "largest difference of a reward": worst,
        **profiled(config, store),
        "metrics_s": metrics_s(),
    }
    print(json.dumps(answer))
    return 0 if worst < 1e-6 else 1


def make_inputs(config: Config, store: RunDir) -> None:
    """Everything that `score` reads, by the stages themselves; kept when it is there."""
    import ray
    import ray.data

    if store.manifest("generations", 1) is not None:
        return  # of an earlier bench: take a new folder after a change of the sample world or of the users
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=2**29,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    for stage, round_id in (("prepare", 0), ("encode", 0), ("train_reward", 0), ("generate", 1)):
        run_pipeline(config, store, Selection(only=stage, round_id=round_id))
    ray.shutdown()


def ten_lists(lists: ListData, num_users: int) -> tuple[ListData, np.ndarray]:
    """The first LISTS lists with a positive of each of the first users that have so many."""
    lists = lists.select((lists.labels > 0).any(dim=1))
    lists = lists.select(torch.argsort(lists.user_ids, stable=True))
    ids = lists.user_ids.numpy()
    users, starts, counts = np.unique(ids, return_index=True, return_counts=True)
    users, starts = users[counts >= LISTS][:num_users], starts[counts >= LISTS][:num_users]
    if len(users) < num_users:
        raise SystemExit(f"only {len(users)} users have {LISTS} lists with a positive")
    rows = (starts[:, None] + np.arange(LISTS)).ravel()
    return lists.select(torch.from_numpy(rows)), users


def encoded(config: Config, store: RunDir, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """User ids [S] and vectors [S, D] of the samples of `users`."""
    encoder = TextEncoder(config.encoder)
    tables = [pq.read_table(file, columns=["user_id", "text"]) for file in store.files("generations", 1)]
    user_ids = np.concatenate([table["user_id"].to_numpy() for table in tables])
    texts = [text for table in tables for text in table["text"].to_pylist()]
    keep = np.flatnonzero(np.isin(user_ids, users))
    return user_ids[keep], encoder.encode([texts[row] for row in keep])


def plain_loop(
    model: Reranker, catalogue: Catalogue, lists: ListData, user_ids: np.ndarray, vectors: np.ndarray
) -> np.ndarray:
    """Mean NDCG@5 of each sample: one forward pass and one sort per list."""
    rewards = []
    for user, vector in zip(user_ids, torch.from_numpy(vectors), strict=True):
        values = []
        for row in torch.nonzero(lists.user_ids == int(user)).squeeze(1).tolist():
            read = model.uses_history and lists.histories
            histories = lists.histories.select(slice(row, row + 1)) if read else None
            batch = catalogue.batch(lists.item_ids[row : row + 1], None, vector[None], histories=histories)
            with torch.inference_mode():
                scores = model(batch)[0].tolist()
            ranked = sorted(zip(scores, lists.labels[row].tolist(), strict=True), key=lambda pair: -pair[0])
            gains = [2**label - 1 for _, label in ranked]
            ideal = sorted(gains, reverse=True)
            values.append(dcg(gains) / dcg(ideal))
        rewards.append(sum(values) / len(values))
    return np.array(rewards)


def dcg(gains: list[float]) -> float:
    return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains[:5]))


def profiled(config: Config, store: RunDir) -> Row:
    """The stage's two actors over all shards, one after the other: the share of time in the encoder and the forward pass."""
    shards = [int(Path(file).stem.removeprefix("part-")) for file in store.files("generations", 1)]
    encoder = ShardEncoder(config.encoder, str(store.path("generations", 1)))
    scorer = ShardScorer(config, store, 1)
    for name in ("scores", "metric_scores"):
        store.start(name, 1)
    profile = cProfile.Profile()
    profile.enable()
    for shard in shards:
        scorer(encoder({"shard": shard}))
    profile.disable()
    total, encode_s, forward_s = 0.0, 0.0, 0.0
    stats = pstats.Stats(profile)
    for (file, _, function), (_, _, own, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
        total += own
        if function == "encode" and file.endswith("knowledge/encoder.py"):
            encode_s = cumulative
        if function == "score" and file.endswith("rerankers/scorer.py"):
            forward_s = cumulative
    return {
        "stage_s": round(total, 2),
        "encoder_s": round(encode_s, 2),
        "forward_s": round(forward_s, 2),
        "share in encoder and forward": round((encode_s + forward_s) / total, 3),
        "forward's share without the encoder": round(forward_s / (total - encode_s), 3),
        "metrics": metric_names(config),
        "redraws": config.reward.num_redraws,
    }


def metrics_s() -> float:
    """Seconds for every metric that `evaluate` reports, of 100,000 lists of ten."""
    rng = np.random.default_rng(0)
    scores, labels = rng.random((100_000, 10)), (rng.random((100_000, 10)) < 0.3).astype(np.float32)
    began = time.perf_counter()
    list_metrics(scores, labels, METRIC_NAMES)
    return round(time.perf_counter() - began, 2)


if __name__ == "__main__":
    sys.exit(main())
