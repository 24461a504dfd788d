"""How often texts are believed that say nothing, and counted ones that do: by the metric's gain and by the likelihood's.

python benchmarks/bench.py belief RUN, where RUN is the folder of a finished run with counted texts. Its fitted backbones get
these, and other users' counted texts, dealt at random; the validation lists decide.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
import numpy as np
import torch
from harness import Row

from dpo4rec_ray.config import read_config
from dpo4rec_ray.rerankers import fit_knowledge
from dpo4rec_ray.rerankers.fit import load_reranker
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.reading import knowledge_vectors, read_catalogue, read_list_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN")
    parser.add_argument("--dealings", type=int, default=40)


def run(options: argparse.Namespace, folder: Path) -> int:
    torch.set_num_threads(1)
    limit = fit_knowledge.BELIEVED_AT
    store = RunDir(options.run_folder)
    config = read_config(store.root)
    catalogue = read_catalogue(store)
    train, valid = read_list_data(store, "train"), read_list_data(store, "valid")
    counted = np.asarray(knowledge_vectors(config, store, "statistics"))
    found: list[Row] = []
    for backbone in config.evaluated_backbones:
        section = config.reranker.of(backbone)
        for seed in range(config.evaluate.num_seeds):
            plain = load_reranker(
                store.path("per_list") / "rerankers" / f"{backbone}-backbone-seed{seed}", catalogue
            )
            for dealing in range(options.dealings + 1):
                order = np.random.default_rng(dealing).permutation(len(counted))
                vectors = counted if dealing == 0 else counted[order]
                fitted = fit_knowledge.fit_reranker(
                    section.architecture, catalogue, train, valid, vectors, section.fit, backbone=plain
                )
                gain = fitted.gain
                assert gain is not None
                better = gain.with_texts - gain.without
                found.append(
                    {
                        "backbone": backbone,
                        "texts": "counted" if dealing == 0 else "another user's",
                        "metric": better > limit * gain.std_error > 0,
                        "likelihood": better > 0 and gain.evidence > limit,
                    }
                )
    rows: list[Row] = []
    for backbone in (*config.evaluated_backbones, ""):
        for texts in ("counted", "another user's"):
            own = [row for row in found if row["texts"] == texts and backbone in ("", row["backbone"])]
            shares = {
                name: f"{sum(row[name] for row in own)} of {len(own)}" for name in ("metric", "likelihood")
            }
            rows.append({"backbone": backbone or "all", "texts": texts, **shares})
    harness.print_table(
        rows, "backbone {backbone} | texts {texts} | by the metric {metric} | by the likelihood {likelihood}"
    )
    harness.write_results(folder / "belief.json", rows)
    return 0
