"""One measured DPO training: python benchmarks/dpo_training.py make|reference|trl|ours SPEC (JSON). Prints one JSON line.

make: a random Llama of about 11 million parameters and a tokenizer of whole words, or a real LLM; and pairs of random words.
reference: their log-probabilities under that Llama, in a process of its own as the stage does it.
trl: TRL's DPOTrainer over these pairs with cached reference log-probabilities; ours: this project's trainer. Both take the
rows of every step in the same order, start from the same LoRA, and report each step's loss, gradient norm and seconds.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import LLAMA_8B

from dpo4rec_ray.config.training import DPOSection, PolicySection

VOCABULARY = 8192
SHAPES = {
    "11m": {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "8b": LLAMA_8B,
}
LORA = {"lora_rank": 8, "lora_alpha": 16}
# The first word's id: those before are <pad> <s> </s> <unk>.
WORDS = 4


def main() -> int:
    what, spec = sys.argv[1], json.loads(sys.argv[2])
    answer = {"make": make, "reference": run_reference, "trl": run_trl, "ours": run_ours}[what](spec)
    print(json.dumps(answer))
    return 0


def make(spec: dict[str, Any]) -> dict[str, Any]:
    """Write model, tokenizer and pairs.parquet into a folder.

    prompt, completion: [shortest, longest] tokens; num_rejected per pair.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(spec["folder"])
    if spec.get("llm"):
        return make_of_llm(spec, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[spec.get("shape", "11m")],
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.device("cuda" if spec.get("shape") == "8b" else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if spec.get("shape") == "8b" else torch.float32)
    model.save_pretrained(folder)
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(WORDS, VOCABULARY))]
    words = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    write_pairs(spec, np.arange(WORDS, VOCABULARY), bos=1, eos=2)
    return {"parameters": sum(p.numel() for p in model.parameters())}


def make_of_llm(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same with links to the files of a real LLM. The words are its tokens of a space and letters, so that the text of the
    tokens, which TRL is given, has the same tokens."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(spec["llm"]).iterdir():
        (folder / file.name).unlink(missing_ok=True)
        (folder / file.name).symlink_to(file.resolve())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [
        number
        for piece, number in tokenizer.get_vocab().items()
        if piece[:1] in ("\u2581", "\u0120") and piece[1:].isascii() and piece[1:].isalpha()
    ]
    write_pairs(spec, np.array(sorted(words)), bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)
    return {"words": len(words)}


def write_pairs(spec: dict[str, Any], words: np.ndarray, bos: int, eos: int) -> None:
    rng = np.random.default_rng(0)

    def tokens(bounds: list[int]) -> list[int]:
        return rng.choice(words, rng.integers(bounds[0], bounds[1] + 1) - 1).tolist()

    rows = [
        {
            "user_id": user,
            "prompt_token_ids": [bos, *tokens(spec["prompt"])],
            "chosen_token_ids": [*tokens(spec["completion"]), eos],
            "rejected_token_ids": [
                [*tokens(spec["completion"]), eos] for _ in range(spec.get("num_rejected", 1))
            ],
        }
        for user in range(spec["rows"])
    ]
    pq.write_table(pa.Table.from_pylist(rows), Path(spec["folder"]) / "pairs.parquet")


def dtype_of(spec: dict[str, Any]) -> str:
    return "bfloat16" if spec.get("llm") or spec.get("shape") == "8b" else "float32"


def run_reference(spec: dict[str, Any]) -> dict[str, Any]:
    """Write reference.parquet beside the pairs."""
    from dpo4rec_ray.policy.objectives import pair_group
    from dpo4rec_ray.policy.reference_scorer import ReferenceScorer
    from dpo4rec_ray.policy.rows import ArrowRows
    from dpo4rec_ray.train.dpo import PairTexts

    folder, began = Path(spec["folder"]), time.monotonic()
    dtype = dtype_of(spec)
    section = PolicySection(gpus_per_worker=float(spec.get("shape") == "8b"))  # all switches on
    pairs = pq.read_table(folder / "pairs.parquet")
    found = ReferenceScorer(str(folder), dtype, section)([pair_group(row) for row in ArrowRows(pairs)])
    pq.write_table(PairTexts().table(pairs["user_id"], found), folder / "reference.parquet")
    return {"pairs": len(pairs), "seconds": round(time.monotonic() - began, 1)}


def run_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """Args of spec: folder, steps; keys of [policy] and [dpo]; rank, world and port for several workers; weights: a folder."""
    rank, world, gpu = spec.get("rank", 0), spec.get("world", 1), spec.get("shape") == "8b"
    os.environ.update(
        **({} if gpu else {"DS_ACCELERATOR": "cpu"}),
        LOCAL_SIZE=str(world),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(spec["port"]),
    )
    import logging

    import torch
    import torch.distributed as dist
    from deepspeed.utils import logger

    from dpo4rec_ray.policy.deepspeed_config import deepspeed_config
    from dpo4rec_ray.policy.logps import CompletionLogps
    from dpo4rec_ray.policy.model import add_lora, checkpoint_activations, gathered_state, load_model
    from dpo4rec_ray.policy.objectives import DPOObjective
    from dpo4rec_ray.policy.reference_scorer import batch_layout
    from dpo4rec_ray.policy.rows import ArrowRows, pair_lengths, with_reference
    from dpo4rec_ray.policy.trainer import Trainer

    logger.setLevel(logging.ERROR)
    dist.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=world)
    folder = Path(spec["folder"])
    pairs = pq.read_table(folder / "pairs.parquet")
    dtype = dtype_of(spec)
    section = PolicySection(
        schedule="constant",
        epochs=1,
        warmup_frac=0.0,
        num_workers=world,
        gpus_per_worker=float(gpu),
        **LORA,
        **{key: value for key, value in spec.items() if key in PolicySection.model_fields},
    )
    layout = batch_layout(str(folder), section)
    lengths = pair_lengths(pairs)[0]
    zero3 = deepspeed_config(section, dtype, 1, {}) if section.zero_stage == 3 else None
    inner: Any = load_model(str(folder), dtype, zero3=zero3)
    if section.tuning == "lora":
        torch.manual_seed(0)
        inner = add_lora(inner, section)
    if section.activation_checkpointing:
        checkpoint_activations(inner)
    model = CompletionLogps(inner, grouped=layout.grouped, chunk_tokens=section.chunk_tokens)
    trainer = Trainer(
        model,
        ArrowRows(with_reference(pairs, pq.read_table(folder / "reference.parquet"))),
        DPOObjective(
            layout,
            DPOSection(**{key: value for key, value in spec.items() if key in DPOSection.model_fields}),
        ),
        section,
        dtype=dtype,
        seed=0,
        lengths=lengths if section.length_sorted else None,
    )
    steps: list[dict[str, float]] = []
    times = [time.monotonic()]
    before = memory_mb()

    def on_step(step: int, num_steps: int, stats: dict[str, float]) -> bool:
        steps.append(stats)
        times.append(time.monotonic())
        return step == spec["steps"]

    trainer.run(on_step)
    if spec.get("weights"):
        from safetensors.torch import save_file

        state = gathered_state(trainer.engine.module, rank, trained_only=True)
        if rank == 0:
            save_file(state, spec["weights"])
    tokens = float(np.median([one["tokens_per_s"] for one in steps[1:] or steps]))
    order = trainer.order.steps(section.batch_size, rank, world, 0)
    work = [lengths[step.rows].mean() / lengths.mean() for step in order]
    return {
        **rates(spec, times, work),
        "tokens_per_s": round(tokens),
        "losses": [one["loss"] for one in steps],
        "grad_norms": [one["grad_norm"] for one in steps],
        "peak_mb": round(torch.cuda.max_memory_allocated() / 2**20 if gpu else memory_mb()),
        "before_mb": round(before),
    }


def run_trl(spec: dict[str, Any]) -> dict[str, Any]:
    """The same with TRL; loss: sigmoid, ipo, hinge, robust."""
    import torch
    import trl_peer
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from dpo4rec_ray.policy.order import StepOrder

    tokenizer = AutoTokenizer.from_pretrained(spec["folder"])
    pairs = pq.read_table(Path(spec["folder"]) / "pairs.parquet").to_pylist()
    steps = StepOrder(len(pairs), spec["batch_size"] * spec["gradient_accumulation_steps"], 1, seed=0)
    order = [row for step in steps.steps(spec["batch_size"], 0, 1) for row in step.rows]

    def text(ids: list[int]) -> str:
        if spec.get("llm"):
            return tokenizer.decode(ids, skip_special_tokens=True).strip()
        return " ".join(f"w{i}" for i in ids if i >= WORDS)

    before_prompt = ""
    if spec.get("llm"):  # some tokenizers put no BOS before a text
        has_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        before_prompt = " " if has_bos else f"{tokenizer.bos_token} "

    rows = [
        {
            "prompt": before_prompt + text(pairs[i]["prompt_token_ids"]),
            "chosen": " " + text(pairs[i]["chosen_token_ids"]),
            "rejected": " " + text(pairs[i]["rejected_token_ids"][0]),
        }
        for i in order[: spec["steps"] * spec["batch_size"] * spec["gradient_accumulation_steps"]]
    ]
    losses: list[float] = []

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **options)
            losses.append(loss.item())  # transformers rounds what it logs
            return loss

    clock = trl_peer.Clock()
    trainer = InOrder(
        model=spec["folder"],
        args=DPOConfig(
            beta=spec["beta"],
            loss_type=[spec["loss"]],
            label_smoothing=spec.get("label_smoothing", 0.0),
            per_device_train_batch_size=spec["batch_size"],
            max_length=None,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=spec["batch_size"],
            **trl_peer.arguments(spec, dtype_of(spec)),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=trl_peer.lora_config(),
        callbacks=[clock],
    )
    trl_peer.start_as_ours(trainer.model, spec["folder"], dtype_of(spec))
    assert trainer.train_dataset["prompt_ids"][0] == pairs[order[0]]["prompt_token_ids"]
    assert trainer.train_dataset["rejected_ids"][0] == pairs[order[0]]["rejected_token_ids"][0]
    before = memory_mb()
    trainer.train()
    return {
        **rates(spec, clock.times),
        "losses": trl_peer.sums_of(losses, spec["gradient_accumulation_steps"]),
        "grad_norms": clock.norms,
        "peak_mb": round(memory_mb()),
        "before_mb": round(before),
    }


def rates(spec: dict[str, Any], times: list[float], work: list[float] | None = None) -> dict[str, Any]:
    """Pairs per second by the median step; the first step warms caches up and does not count.

    work: the mean length of each step's pairs over that of all, so that steps of long pairs count for what they are.
    """
    seconds = np.diff(times)
    weights = np.array(work)[: len(seconds)] if work else np.ones(len(seconds))
    if len(seconds) > 1:
        seconds, weights = seconds[1:], weights[1:]
    pairs = spec["batch_size"] * spec["gradient_accumulation_steps"] * spec.get("world", 1)
    return {
        "pairs_per_s": round(pairs / float(np.median(seconds / weights)), 3),
        "steps": len(times) - 1,
        "seconds": round(float(seconds.sum()), 2),
    }


def memory_mb() -> float:
    """Peak resident size of this process, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
