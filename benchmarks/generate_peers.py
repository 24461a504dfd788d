"""Peers of the stage `generate`, each a program of its own; `benchmarks/bench.py generate` runs them.

    python benchmarks/generate_peers.py model FOLDER [--shape 4m] [--stop never]
    python benchmarks/generate_peers.py vllm RECIPE [section.key=value ...]
    python benchmarks/generate_peers.py transformers RECIPE [section.key=value ...]
    python benchmarks/generate_peers.py users FOLDER [--users 100000]

Each prints one JSON line. `vllm` and `transformers` take the recipe and overrides of `jobs/run.py`, so that model, prompts,
lengths and seeds are those of the stage; the users must be prepared. vllm and torch are imported late: what an engine
reads from its environment has to be set before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from harness import LLAMA_8B, ROOT

from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.knowledge.catalogue_prompts import TokenizedPrompts
from dpo4rec_ray.policy.model import load_tokenizer
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.store.policies import base_llm_path
from dpo4rec_ray.texts.policy_texts import engine_spec, served_weights
from dpo4rec_ray.workers.placement import WORKER_ENV, engine_env

BUNDLED = ROOT / "dpo4rec_ray" / "policy" / "bundled"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Of the vocabulary. A random model draws all tokens alike, so lengths have a mean of 1 / 0.03.
STOP_SHARE = 0.03
SHAPES = {
    "4m": {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4, "num_attention_heads": 8},
    # Only its config is written; vLLM makes the weights up (load_format "dummy").
    "8b": LLAMA_8B,
}
BATCHES = (4, 8, 16, 32)  # users per batch that the transformers peer tries
ITEMS, PART = 10_000, 1_000_000  # of the synthetic users: catalogue, users per file


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/generate_peers.py", description="One measurement of generation."
    )
    programs = parser.add_subparsers(dest="program", required=True)
    model = programs.add_parser("model", help="write the folder of a random LLM")
    model.add_argument("folder", type=Path)
    model.add_argument("--shape", choices=("bundled", *SHAPES), default="4m")
    model.add_argument("--stop", choices=("never", "often"), default="never")
    users = programs.add_parser("users", help="write synthetic artifacts `users` and `items`")
    users.add_argument("folder", type=Path, help="of the run")
    users.add_argument("--users", type=int, default=100_000)
    users.add_argument("--events", type=int, default=8, help="of every user")
    for name, about in (
        ("vllm", "LLM.generate on the stage's prompts"),
        ("transformers", "generate on the stage's prompts"),
    ):
        program = programs.add_parser(name, help=about)
        program.add_argument("recipe")
        program.add_argument("changes", nargs="*")
        program.add_argument("--users", type=int, default=0, help="only the first; 0: all")
        if name == "vllm":
            program.add_argument("--calls", choices=("one", "shard"), default="one")
            program.add_argument("--drop", default="", help="engine arguments left to vLLM, comma-separated")
            program.add_argument("--engine-args", default="{}", help="JSON, over those of the stage")
            program.add_argument("--threads", type=int, default=1)
            program.add_argument("--part", default="0/1", help="i/k: every k-th user, and wait for k engines")
            program.add_argument("--gate", type=Path, help="folder where engines wait for one another")
            program.add_argument("--no-seeds", action="store_true")
            program.add_argument("--compare", action="store_true", help="with the round's generations")
    options = parser.parse_args()
    print(json.dumps(PROGRAMS[options.program](options)))
    return 0


def write_model(options: argparse.Namespace) -> dict[str, Any]:
    """A Llama with random weights (seed 0) and the bundled tokenizer, or the bundled model itself.

    stop "never": no EOS is named, so that every sample has max_new_tokens. vLLM takes the tokenizer's EOS and those of
    generation_config.json. "often": a share of the vocabulary ends a sample, so that lengths are geometric.
    """
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(BUNDLED / name, folder)
    settings = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    vocabulary = SHAPES.get(options.shape, {}).get("vocab_size", settings["vocab_size"])
    _widen(folder / "tokenizer.json", vocabulary)
    if options.shape == "bundled":
        shutil.copy(BUNDLED / "model.safetensors", folder)
        _write(folder / "config.json", settings | {"eos_token_id": None})
    else:
        _write_llama(folder, options.shape, vocabulary)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del tokenizer["eos_token"]
    _write(folder / "tokenizer_config.json", tokenizer)
    generation: dict[str, Any] = {"bos_token_id": 1, "pad_token_id": 0}
    if options.stop == "often":
        count = round(STOP_SHARE * vocabulary)
        generation["eos_token_id"] = np.linspace(8, vocabulary - 1, count).astype(int).tolist()
    _write(folder / "generation_config.json", generation)
    return {"folder": str(folder)}


def _write_llama(folder: Path, shape: str, vocabulary: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"vocab_size": vocabulary, "max_position_embeddings": 1024, **SHAPES[shape]}
    config = LlamaConfig(**settings, bos_token_id=1, eos_token_id=None, pad_token_id=0, dtype="float32")
    if shape == "8b":
        config.dtype = "bfloat16"
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        save_file({"unused": torch.zeros(1)}, folder / "model.safetensors")  # a folder without one is refused
        return
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def _widen(file: Path, vocabulary: int) -> None:
    """Give every id of the vocabulary a word, so that any sample has a text; prompts are encoded as before."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words |= {f"word{number}": number for number in range(len(words), vocabulary)}
    _write(file, tokenizer)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Requests:
    """What the stage asks its engine, in user id order."""

    user_ids: list[int]
    prompts: list[list[int]]
    seeds: list[int]


def requests_of(config: Config, store: RunDir, num_users: int) -> Requests:
    """The prompts and seeds of the stage; num_users 0: of all users."""
    from dpo4rec_ray.stages.generate import SPLITS

    tokenizer = load_tokenizer(base_llm_path(config, store))
    items = store.read("items", columns=["title", "attributes"])
    prompts = TokenizedPrompts(tokenizer, items, config.llm, config.prompt, config.generate)
    rows = store.read("users", split=SPLITS).sort_by("user_id")
    found = Requests([], [], [])
    seed = seed_of(config.run.seed, "generate", 0)
    for row in rows.slice(0, num_users or None).to_pylist():
        prompt, _ = prompts.user(row["profile"], row["history_item_ids"], row["history_ratings"])
        found.user_ids.append(row["user_id"])
        found.prompts.append(prompt)
        found.seeds.append(seed_of(seed, row["user_id"]))
    return found


def run_vllm(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of LLM.generate, its start excluded: everything in one call, or one call per shard."""
    config, store = _prepared(options)
    set_env({**engine_env(config), "OMP_NUM_THREADS": str(options.threads)})
    arguments = engine_spec(config, served_weights(config, store, 0), 0).arguments() | {
        "disable_log_stats": True
    }
    arguments |= json.loads(options.engine_args)
    for name in options.drop.split(","):
        arguments.pop(name, None)
    from vllm import LLM, SamplingParams

    index, count = map(int, options.part.split("/"))
    asked = requests_of(config, store, options.users)
    chosen = slice(index, None, count)
    user_ids, prompts, seeds = asked.user_ids[chosen], asked.prompts[chosen], asked.seeds[chosen]
    began = time.perf_counter()
    llm = LLM(**arguments)
    start_s = time.perf_counter() - began
    section = config.generate_by(0)
    params = [
        SamplingParams(
            n=section.num_samples,
            seed=None if options.no_seeds else seed,
            temperature=section.temperature,
            top_p=section.top_p,
            max_tokens=section.max_new_tokens,
        )
        for seed in seeds
    ]
    asks = [{"prompt_token_ids": prompt} for prompt in prompts]
    shards = np.asarray(user_ids) // section.users_per_shard
    if options.calls == "one":
        calls = [slice(None)]
    else:
        firsts = [int(np.searchsorted(shards, shard)) for shard in np.unique(shards)]
        calls = [slice(*pair) for pair in zip(firsts, [*firsts[1:], len(shards)], strict=True)]
    if options.gate:
        _wait_for_others(options.gate, index, count)
    began = time.perf_counter()
    outputs = [out for call in calls for out in llm.generate(asks[call], params[call], use_tqdm=False)]
    seconds = time.perf_counter() - began
    llm.llm_engine.engine_core.shutdown()  # on a GPU it has processes of its own, which Python's exit may wait for
    found = [[list(sample.token_ids) for sample in out.outputs] for out in outputs]
    lengths = np.array([len(tokens) for samples in found for tokens in samples])
    answer = {
        "users": len(user_ids),
        "samples": len(lengths),
        "tokens": int(lengths.sum()),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(lengths.sum() / seconds, 1),
        "start_s": round(start_s, 1),
        "mean_length": round(float(lengths.mean()), 1),
        "longest": int(lengths.max()),
        "prompt_tokens": round(float(np.mean([len(prompt) for prompt in prompts])), 1),
        "rss_mib": round(psutil.Process().memory_info().rss / 2**20),
    }
    if options.compare:
        answer["same_samples"] = _same(store, dict(zip(user_ids, found, strict=True)))
    return answer


def _wait_for_others(gate: Path, index: int, count: int) -> None:
    """Return when `count` engines are here."""
    gate.mkdir(parents=True, exist_ok=True)
    (gate / str(index)).touch()
    while len(list(gate.iterdir())) < count:
        time.sleep(0.05)


def _same(store: RunDir, found: dict[int, list[list[int]]]) -> float:
    """Share of the stage's samples that are the same, token for token."""
    table = store.read("generations", 1, columns=["user_id", "sample_id", "token_ids"])
    same = [found[row["user_id"]][row["sample_id"]] == row["token_ids"] for row in table.to_pylist()]
    return round(float(np.mean(same)), 4)


def run_transformers(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of `generate`, one thread: at each batch size for one batch, then at the best for the rest."""
    config, store = _prepared(options)
    set_env(WORKER_ENV)
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    asked = requests_of(config, store, options.users)
    model = AutoModelForCausalLM.from_pretrained(
        base_llm_path(config, store), dtype=getattr(torch, config.llm.dtype)
    ).eval()
    section = config.generate_by(0)

    def rate(prompts: list[list[int]]) -> tuple[int, float]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        began = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=section.temperature,
                top_p=section.top_p,
                top_k=0,
                max_new_tokens=section.max_new_tokens,
                num_return_sequences=section.num_samples,
            )
        seconds = time.perf_counter() - began
        # No sample ends early: the model has no EOS.
        return output.shape[0] * (output.shape[1] - longest), seconds

    prompts = sorted(asked.prompts, key=len)  # little padding
    rate(prompts[:1])
    middle = len(prompts) // 2
    by_batch: dict[int, float] = {}
    for size in BATCHES:
        tokens, seconds = rate(prompts[max(0, middle - size // 2) :][:size])
        by_batch[size] = round(tokens / seconds, 1)
    best = max(by_batch, key=lambda size: by_batch[size])
    total: Counter[str] = Counter()
    elapsed = 0.0
    for first in range(0, len(prompts), best):
        tokens, seconds = rate(prompts[first : first + best])
        total["tokens"] += tokens
        elapsed += seconds
    return {
        "users": len(prompts),
        "samples": len(prompts) * section.num_samples,
        "tokens": total["tokens"],
        "seconds": round(elapsed, 2),
        "tokens_per_s": round(total["tokens"] / elapsed, 1),
        "batch": best,
        "by_batch": by_batch,
    }


def set_env(env: dict[str, str]) -> None:
    """Before torch is loaded: it reads the number of threads once, and two that spin on a busy core halve every rate."""
    assert "torch" not in sys.modules
    os.environ.update(env)


def _prepared(options: argparse.Namespace) -> tuple[Config, RunDir]:
    config = load_config(options.recipe, options.changes)
    return config, RunDir(Path(config.run.root) / config.run.name)


def write_users(options: argparse.Namespace) -> dict[str, Any]:
    """Artifacts `users` and `items` of any size without a data set behind them: random histories, no test users."""
    store, rng = RunDir(options.folder), np.random.default_rng(0)
    store.start("items")
    names = pa.array([f"Item {number}" for number in range(ITEMS)])
    attributes = pa.array([[f"genre: {number % 20}"] for number in range(ITEMS)])
    items = {"item_id": np.arange(ITEMS), "raw_id": names, "title": names, "attributes": attributes}
    store.write("items", pa.table(items))
    store.finish(Manifest("items", "synthetic", rows=ITEMS, produced="synthetic"))
    store.start("users")
    for part, low in enumerate(range(0, options.users, PART)):
        ids = np.arange(low, min(low + PART, options.users))
        ends = np.arange(len(ids) + 1, dtype=np.int32) * options.events
        history = rng.integers(0, ITEMS, len(ids) * options.events)
        ratings = rng.integers(1, 6, len(history)).astype(np.float32)
        columns = {
            "user_id": ids,
            "raw_id": pa.array(ids).cast(pa.string()),
            "profile": pa.repeat("", len(ids)),
            "split": pa.array(np.where(ids % 10, "train", "valid")),
            "fold": ids % 5,
            "history_item_ids": pa.ListArray.from_arrays(ends, history),
            "history_ratings": pa.ListArray.from_arrays(ends, ratings),
        }
        store.write("users", pa.table(columns), part=part)
    store.finish(Manifest("users", "synthetic", rows=options.users, produced=f"synthetic-{options.users}"))
    return {"users": options.users}


PROGRAMS = {
    "model": write_model,
    "users": write_users,
    "vllm": run_vllm,
    "transformers": run_transformers,
}

if __name__ == "__main__":
    sys.exit(main())
