"""What an LLM's texts bring beside counted ones: python benchmarks/bench.py beside RUN, a finished run with both.

RUN's rerankers of each backbone and seed score the same lists. What the LLM's texts change in a backbone's scores is added to the
scores of the reranker with counted texts, as much as is best on the validation lists, and is kept if it is believed there as
texts are behind a backbone (rerankers/fit_knowledge.py). Another user's texts go the same way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
import numpy as np
import torch
from harness import Row
from torch import Tensor

from dpo4rec_ray.config import Config, read_config
from dpo4rec_ray.core.evidence import evidence_of_texts
from dpo4rec_ray.core.intervals import paired_bootstrap, signed
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.rerankers.catalogue import Catalogue
from dpo4rec_ray.rerankers.fit import ListData, load_reranker
from dpo4rec_ray.rerankers.fit_knowledge import BELIEVED_AT
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.stages.evaluate import STATISTICS, all_texts, fit_name, system_name
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.reading import knowledge_vectors, read_catalogue, read_list_data

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
METRIC = "ndcg@5"
Texts = int | str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN")


def run(options: argparse.Namespace, folder: Path) -> int:
    torch.set_num_threads(1)
    store = RunDir(options.run_folder)
    config = read_config(store.root)
    catalogue = read_catalogue(store)
    lists = {split: read_list_data(store, split) for split in ("valid", "test")}
    vectors = {
        texts: None if texts is None else torch.tensor(knowledge_vectors(config, store, texts))
        for texts in all_texts(config, store.require("per_list").stats["last_round"])
    }
    added = [texts for texts in vectors if texts not in (None, STATISTICS)]
    found: list[Row] = []
    for backbone in config.evaluated_backbones:
        seeds = [
            scored(config, store, catalogue, lists, vectors, backbone, seed)
            for seed in range(config.evaluate.num_seeds)
        ]
        for texts in added:
            weights, gains = zip(*(chosen(lists["valid"], one["valid"], texts) for one in seeds), strict=True)
            differences = []
            for weight, one in zip(weights, seeds, strict=True):
                test = one["test"]
                both = test[STATISTICS] + weight * (test[texts] - test[None])
                differences.append(metric(lists["test"], both) - metric(lists["test"], test[STATISTICS]))
            mean = paired_bootstrap(np.mean(differences, axis=0), lists["test"].user_ids.numpy())
            row: Row = {"backbone": backbone, "texts": system_name(config, texts)}
            row |= {"kept": f"{sum(weight > 0 for weight in weights)} of {len(seeds)}"}
            row |= {"validation": ", ".join(f"{gain:+.4f}" for gain in gains)}
            found.append(harness.note(row | {"test": signed(mean.mean, (mean.low, mean.high))}))
    harness.print_table(
        found, "backbone {backbone} | texts {texts} | kept {kept} | validation {validation} | test {test}"
    )
    harness.write_results(folder / f"beside-{store.root.name}.json", found)
    return 0


def scored(
    config: Config,
    store: RunDir,
    catalogue: Catalogue,
    lists: dict[str, ListData],
    vectors: dict[Texts, Tensor | None],
    backbone: str,
    seed: int,
) -> dict[str, dict[Texts, np.ndarray]]:
    """Scores [n, L] of each split's lists by RUN's rerankers of one backbone and seed, by the texts they read."""
    found: dict[str, dict[Texts, np.ndarray]] = {split: {} for split in lists}
    for texts, own in vectors.items():
        folder = store.path("per_list") / "rerankers" / fit_name(config, backbone, texts, seed)
        scorer = ListScorer([load_reranker(folder, catalogue)], catalogue)
        for split, some in lists.items():
            found[split][texts] = scorer.score(some.item_ids, some.mask, own, some.user_rows, some.histories)
    return found


def metric(lists: ListData, scores: np.ndarray) -> np.ndarray:
    return list_metrics(scores, lists.labels.numpy(), [METRIC], lists.mask.numpy())[METRIC]


def chosen(valid: ListData, scores: dict[Texts, np.ndarray], texts: Texts) -> tuple[float, float]:
    """The weight of what the texts change, 0 if they are not believed; the best gain on the validation lists."""
    counted, change = scores[STATISTICS], scores[texts] - scores[None]
    before = metric(valid, counted)
    gains = {weight: float((metric(valid, counted + weight * change) - before).mean()) for weight in WEIGHTS}
    best = max(gains, key=lambda weight: gains[weight])
    users, labels, mask = (one.numpy() for one in (valid.user_ids, valid.labels, valid.mask))
    evidence = evidence_of_texts(counted, counted + best * change, labels, mask, users)
    return (best if evidence > BELIEVED_AT else 0.0), gains[best]
