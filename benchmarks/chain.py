"""The whole chain at Amazon-Books' size on CPUs: every stage at its real row counts, with texts that nobody wrote.

python benchmarks/bench.py chain [--reviews 140658,1406582] [section.key=value ...]

Files of the published size (11,906 users, 17,332 items, 1,406,582 reviews; `amazon_files.py`, who reviews what is random)
go through `amazon_books`: lists, prompts, N texts per user, rewards, pairs, DPO, evaluation of all backbones, publishing
and a server. Made small: the LLM (the bundled one; its texts are random words, 256 tokens at most), the encoder (one
layer, random, as wide as MiniLM), and epochs (1). The first size is a tenth, so that the table shows how a stage grows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import psutil
import pyarrow.compute as pc
from harness import ROOT, Row
from serve import served as server

from dpo4rec_ray.config import Config, load_config, read_config
from dpo4rec_ray.knowledge.catalogue_prompts import TokenizedPrompts
from dpo4rec_ray.knowledge.completions import Answer, Completion
from dpo4rec_ray.knowledge.encoder import MINILM, resolve_encoder
from dpo4rec_ray.knowledge.engine_loop import EngineStats
from dpo4rec_ray.pipeline import STAGES, steps
from dpo4rec_ray.policy.model import load_tokenizer
from dpo4rec_ray.serving.client import Client
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.storage.places import size_of
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.memory import tree_mb
from dpo4rec_ray.store.policies import base_llm_path
from dpo4rec_ray.texts.policy_texts import PolicyTexts
from dpo4rec_ray.texts.sources import SOURCES
from dpo4rec_ray.texts.text_source import WriterPlacement, catalogue

LENGTH, SPREAD = 200, 0.2  # tokens of a text: median, and standard deviation of the logarithm
ON_CPUS = {
    "run.num_rounds": 1,
    "llm.path": ROOT / "dpo4rec_ray/policy/bundled",
    "llm.dtype": "float32",
    "llm.max_model_len": 1024,
    "generate.num_engines": 2,
    "generate.gpus_per_engine": 0,
    "generate.cpus_per_engine": 0.5,
    "encoder.num_workers": 2,
    "encoder.cpus_per_worker": 0.5,
    "encoder.gpus_per_worker": 0,
    "reward.num_scorers": 2,
    "reward.cpus_per_scorer": 0.5,
    "reward.gpus_per_worker": 0,
    "reward.must_read": "false",  # nothing can be read in random words
    "policy.num_workers": 2,
    "policy.gpus_per_worker": 0,
    "policy.epochs": 1,
    "evaluate.gpus_per_task": 0,
    "evaluate.num_seeds": 1,
    "reranker.epochs": 1,
    "reranker.knowledge": "input",  # the default's gates shut out what says nothing: all rewards would be the same
}
REQUESTS = 2_000
PEAKS = "peaks.json"


class RandomWords:
    """In place of an engine: as many tokens as a real text has, and nothing in them."""

    def __init__(self, tokenizer: Any, max_new_tokens: int):
        self._tokenizer, self._most, self._finished = tokenizer, max_new_tokens, 0
        words = tokenizer.batch_decode([[one] for one in range(len(tokenizer))])
        self._words = np.array(
            [one for one, word in enumerate(words) if word.strip().isalpha() and len(word) > 3]
        )

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], counts: Sequence[int]
    ) -> list[Answer]:
        answers = []
        for seed, count in zip(seeds, counts, strict=True):
            rng = np.random.default_rng(seed)
            lengths = np.minimum(LENGTH * rng.lognormal(0, SPREAD, count), self._most).astype(int)
            ids = [self._words[rng.integers(len(self._words), size=length)].tolist() for length in lengths]
            texts = self._tokenizer.batch_decode(ids)
            answers.append(
                Answer([Completion(one, text, "stop") for one, text in zip(ids, texts, strict=True)])
            )
            self._finished += count
        return answers

    def finished(self) -> int:
        return self._finished


class RandomTexts(PolicyTexts):
    """Real prompts, random answers."""

    def __init__(self, config: Config, store: RunDir):
        tokenizer = load_tokenizer(base_llm_path(config, store))
        prompts = TokenizedPrompts.of_recipe(config, tokenizer, catalogue(store))
        super().__init__(prompts, RandomWords(tokenizer, config.generate.max_new_tokens), store.root)

    @classmethod
    def placement(cls, config: Config, store: RunDir, policy_round: int) -> WriterPlacement:
        return WriterPlacement(cls)

    def stats(self) -> EngineStats | None:
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("changes", nargs="*", metavar="section.key=value")
    parser.add_argument("--reviews", default="140658,1406582", help="sizes, the one that counts last")


def run(options: argparse.Namespace, folder: Path) -> int:
    """A size after the other. Complete stages of an earlier call are kept."""
    folder = folder / "chain"
    encoder = folder / "encoder"
    if not encoder.exists():
        write_encoder(encoder)
    found: list[Row] = []
    for reviews in map(int, options.reviews.split(",")):
        raw = folder / f"raw-{reviews}"
        if not raw.exists():
            module = ["-m", "benchmarks.amazon_files", "--like", "amazon-books-core", str(raw)]
            harness.run(*module, "--reviews", str(reviews))
        keys = ON_CPUS | {
            "data.raw_dir": raw,
            "encoder.path": encoder,
            "run.root": folder,
            "run.name": f"books-{reviews}",
        }
        changes = [*(f"{key}={value}" for key, value in keys.items()), *options.changes]
        harness.run("benchmarks/chain.py", "amazon_books", *changes)
        found += stages(folder / f"books-{reviews}") + served(folder / f"books-{reviews}", folder)
    harness.print_table(
        found,
        "users {users:,} | stage {stage} | rows in {rows_in:,} | rows out {rows_out:,} | s {seconds:,.1f} | "
        "MB on disk {mb:,.1f} | largest process, MiB {largest_mib:,.0f} | it is {largest} | "
        "driver, MiB {driver_mib:,.0f} | all, MiB {all_mib:,.0f}",
    )
    harness.write_results(folder / "chain.json", found)
    return 0


def write_encoder(folder: Path) -> None:
    """One layer with random weights, as wide as MiniLM and with its tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(resolve_encoder(MINILM))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=384,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def stages(run_folder: Path) -> list[Row]:
    """What the manifests say of each stage, and what was seen of the processes meanwhile."""
    store = RunDir(run_folder)
    seen = json.loads((run_folder / PEAKS).read_text())
    found: list[Row] = []
    for name, round_id in steps(read_config(run_folder)):
        manifests = [store.manifest(*one) for one in STAGES[name].writes(round_id)]
        made = [one for one in manifests if one is not None]
        if made:
            found.append(
                {
                    "users": store.require("users").rows,
                    "stage": f"{name}({round_id})",
                    "rows_in": made[-1].rows_in,
                    "rows_out": made[-1].rows,
                    "seconds": made[-1].seconds,
                    "mb": sum(one.bytes for one in made) / 1e6,
                    **seen.get(f"{name}({round_id})", {}),
                }
            )
    return found


def served(run_folder: Path, folder: Path) -> list[Row]:
    """Publish the run, start a server of two replicas, and ask for the test users' lists one after the other."""
    registry = folder / f"registry-{run_folder.name}"
    shutil.rmtree(registry, ignore_errors=True)
    store = RunDir(run_folder)
    num_users = store.require("users").rows
    model = min(one.name for one in (run_folder / "eval/rerankers").glob("prm-dpo4rec-round1-*"))
    publish = ["-m", "dpo4rec_ray", "serve", "publish", "--promote", "--registry", str(registry)]
    seconds, peaks, _ = harness.watched([*publish, str(run_folder), "--model", model])
    published = {
        "users": num_users,
        "stage": "publish",
        "rows_in": num_users,
        "seconds": seconds,
        "mb": size_of(registry) / 1e6,
        "all_mib": peaks.tree_mib,
    }
    began = time.monotonic()
    with server("dpo4rec_ray", Registry(registry), "serving.num_replicas=2") as (url, process):
        client, started = Client(url), time.monotonic() - began
        users, items = (store.read(kind, columns=["raw_id"])["raw_id"] for kind in ("users", "items"))
        lists = store.read("lists", columns=["user_id", "candidate_item_ids", "split"])
        asked = lists.filter(pc.field("split") == "test").slice(0, REQUESTS).to_pylist()
        times = []
        for row in asked:
            candidates = items.take(row["candidate_item_ids"]).to_pylist()
            at = time.monotonic()
            answer = client.rerank(candidates, user_id=users[row["user_id"]].as_py())
            times.append(time.monotonic() - at)
            if answer.meta.fallback or answer.meta.knowledge != "stored":
                raise SystemExit(f"a list of user {row['user_id']} was answered without the user's text")
        answered = {
            "users": num_users,
            "stage": f"serve ({started:.0f} s to the first answer, p50 {1e3 * np.median(times):.1f} ms)",
            "rows_in": len(asked),
            "rows_out": len(asked),
            "seconds": sum(times),
            "all_mib": tree_mb(process.pid),
        }
    return [published, answered]


class Watch(threading.Thread):
    """The largest sizes of this process and its descendants, by stage, without what they map of Ray's object store."""

    def __init__(self, run_folder: Path):
        super().__init__(daemon=True)
        self._folder = run_folder
        self.found: dict[str, Row] = {}
        with contextlib.suppress(OSError, ValueError):  # of an earlier call, for stages that are kept
            self.found = json.loads((run_folder / PEAKS).read_text())

    def run(self) -> None:
        while True:
            time.sleep(1)
            with contextlib.suppress(OSError, ValueError, KeyError):
                beat = json.loads((self._folder / "heartbeat.json").read_text())
                if beat["pid"] == os.getpid() and not beat["ended"] and beat["stage"]:
                    self._look(f"{beat['stage']}({beat['round']})")

    def _look(self, stage: str) -> None:
        sizes: dict[str, float] = {}
        here = psutil.Process()
        for process in (here, *here.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError, KeyError):
                name = "driver" if process.pid == here.pid else _name(process)
                sizes[f"{name} {process.pid}"] = harness.own_mib(process.pid)
        row = self.found.setdefault(stage, {"largest_mib": 0.0, "driver_mib": 0.0, "all_mib": 0.0})
        largest = max(
            (name for name in sizes if not name.startswith("driver ")), key=lambda name: sizes[name]
        )
        if sizes[largest] > row["largest_mib"]:
            row |= {"largest_mib": sizes[largest], "largest": largest.rsplit(" ", 1)[0]}
        row["driver_mib"] = max(row["driver_mib"], sizes[f"driver {here.pid}"])
        row["all_mib"] = max(row["all_mib"], sum(sizes.values()))
        (self._folder / PEAKS).write_text(json.dumps(self.found, indent=1))


def _name(process: psutil.Process) -> str:
    title = " ".join(process.cmdline()[:1])
    return title.partition("(")[0] if title.startswith("ray::") else process.name()


def main() -> int:
    """The run itself: `dpo4rec run` with another writer in the LLM's place."""
    from dpo4rec_ray.cli.run import main as run_recipe

    config = load_config(sys.argv[1], sys.argv[2:])
    folder = Path(config.run.root) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    SOURCES["vllm"] = RandomTexts
    Watch(folder).start()
    return run_recipe(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
