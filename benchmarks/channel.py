"""The channel from text to ranking: what texts add to a backbone on validation lists, by encoder, way and adapter.

python benchmarks/bench.py channel RUN, where RUN is the folder of a run with reward.oracle = true (and a source of texts). Texts:
those of round 0, counted ones, and the oracle's, made from later likes, which is the ceiling. Each is a fit of its own behind the
same backbone without texts, and is measured where its epoch and gates were chosen: the figures compare ways, they are no results.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import time
from pathlib import Path

import harness
import numpy as np
import torch
from harness import Row

from dpo4rec_ray.config import Config, read_config
from dpo4rec_ray.config.texts import EncoderSection
from dpo4rec_ray.core.intervals import clustered_std_error
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.knowledge.encoder import TextEncoder
from dpo4rec_ray.knowledge.prompts import item_text
from dpo4rec_ray.rerankers import Reranker
from dpo4rec_ray.rerankers.adapter import ADAPTERS
from dpo4rec_ray.rerankers.catalogue import Catalogue
from dpo4rec_ray.rerankers.fit_knowledge import fit_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.reading import read_catalogue, read_list_data

WAYS = ("regression", *(f"{way} {adapter}" for way in ("residual", "input") for adapter in ADAPTERS))
# "pieces": the mean of the vectors of what stands between full stops, semicolons and commas.
READINGS = ("whole", "pieces")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN")
    parser.add_argument("--backbones", default="", help="default: the run's reranker.backbone")
    parser.add_argument("--encoders", default="", help="of encoder.path; default: the run's")
    parser.add_argument("--readings", default=",".join(READINGS))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--kinds", default="user,statistics,oracle")
    parser.add_argument(
        "--items",
        default="attributes",
        choices=("attributes", "title", "stored"),
        help="what stands for an item: its attributes too, its title alone, or the vector that RUN has (encoder.describe_items)",
    )
    parser.add_argument("--seeds", type=int, default=1)


def run(options: argparse.Namespace, folder: Path) -> int:
    torch.set_num_threads(1)
    store = RunDir(options.run_folder)
    config = read_config(store.root)
    backbones = options.backbones.split(",") if options.backbones else [config.reranker.backbone]
    encoders = options.encoders.split(",") if options.encoders else [config.encoder.path]
    found: list[Row] = []
    for path in encoders:
        encoder = TextEncoder(EncoderSection(path=path, max_tokens=config.encoder.max_tokens))
        bench = Bench(config, store, encoder, options.items)
        for backbone, seed in itertools.product(backbones, range(options.seeds)):
            plain = bench.fit(backbone, None, "regression", seed, None)[0]
            choices = itertools.product(
                *(one.split(",") for one in (options.kinds, options.readings, options.ways))
            )
            for kind, reading, way in choices:
                vectors = bench.vectors(kind, reading)
                if vectors is None:
                    continue
                began = time.perf_counter()
                model, kept = bench.fit(backbone, vectors, way, seed, plain)
                row: Row = {"encoder": Path(path).name, "backbone": backbone, "texts": kind, "read": reading}
                row |= {"way": way, "seed": seed, **bench.compared(plain, model, vectors), "kept": kept}
                found.append({**row, "seconds": round(time.perf_counter() - began, 1)})
                print(json.dumps(found[-1]), flush=True)
    harness.print_table(
        found,
        "encoder {encoder} | backbone {backbone} | texts {texts} | "
        "read {read} | way {way} | seed {seed} | without {without} | gain {gain} | "
        "se {std_error} | kept {kept} | seconds {seconds}",
    )
    harness.write_results(folder / "channel.json", found)
    return 0


class Bench:
    """The lists of a run, and its texts under one encoder."""

    def __init__(self, config: Config, store: RunDir, encoder: TextEncoder, items_by: str) -> None:
        self._config, self._store, self._encoder = config, store, encoder
        items = store.read("items", columns=["title", "attributes"]).to_pylist()
        if items_by == "stored":
            self._catalogue = read_catalogue(store)
        else:
            by_title = items_by == "title"
            texts = [item_text(item["title"], [] if by_title else item["attributes"]) for item in items]
            attributes = [item["attributes"] for item in items]
            self._catalogue = Catalogue.from_items(attributes, encoder.encode(texts))
        self._train, self._valid = read_list_data(store, "train"), read_list_data(store, "valid")

    @functools.cache  # noqa: B019 (a bench lives as long as its encoder)
    def vectors(self, kind: str, reading: str) -> np.ndarray | None:
        """[U, D]; None where the run has no such texts."""
        artifact = "knowledge" if kind == "user" else "references"
        where = [("subject", "=", kind), ("sample_id", "=", 0)]
        table = self._store.read(artifact, where=where, columns=["subject_id", "text"])
        if not len(table):
            return None
        texts = table["text"].to_pylist()
        vectors = np.zeros((self._store.require("users").rows, self._encoder.width), np.float32)
        if reading == "whole":
            vectors[table["subject_id"].to_numpy()] = self._encoder.encode(texts)
            return vectors
        pieces = [
            [one.strip() for one in re.split(r"[.;,\n]", text) if one.strip()] or [text] for text in texts
        ]
        encoded = self._encoder.encode([one for text in pieces for one in text])
        encoded /= np.linalg.norm(encoded, axis=1, keepdims=True)
        ends = np.cumsum([len(text) for text in pieces])
        for user, own in zip(table["subject_id"].to_numpy(), np.split(encoded, ends[:-1]), strict=True):
            vectors[user] = own.mean(axis=0)
        return vectors

    def fit(
        self, backbone: str, vectors: np.ndarray | None, way: str, seed: int, plain: Reranker | None
    ) -> tuple[Reranker, bool | None]:
        knowledge, _, adapter = way.partition(" ")
        section = self._config.reranker.of(backbone).model_copy(
            update={"knowledge": knowledge, "adapter": adapter or self._config.reranker.adapter}
        )
        found = fit_reranker(
            section.architecture, self._catalogue, self._train, self._valid, vectors, section.fit, seed=seed,
            backbone=plain,
        )  # fmt: skip
        return found.model, None if found.gain is None else found.gain.kept

    def compared(self, plain: Reranker, model: Reranker, vectors: np.ndarray) -> Row:
        valid = self._valid
        values = []
        for one, own in ((plain, None), (model, vectors)):
            scores = ListScorer([one], self._catalogue).score(
                valid.item_ids, valid.mask, own, valid.user_rows, valid.histories
            )
            values.append(
                list_metrics(scores, valid.labels.numpy(), ["ndcg@5"], valid.mask.numpy())["ndcg@5"]
            )
        gain = values[1] - values[0]
        return {
            "without": round(float(values[0].mean()), 4),
            "gain": round(float(gain.mean()), 4),
            "std_error": round(clustered_std_error(gain, valid.user_ids.numpy()), 4),
        }
