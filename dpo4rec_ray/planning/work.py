"""What each stage has to do, as one number that its time grows with, and who shares it.

Add a stage's function to WORK when it is added to the pipeline. The number's unit is also that of a rate:
units per second of one worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dpo4rec_ray.config import Config
from dpo4rec_ray.planning.sizes import Sizes
from dpo4rec_ray.store.user_rows import turn_users
from dpo4rec_ray.train.learners import LEARNERS

# A token of a prompt costs less than one that is written: all of a prompt are computed at once, and the N texts of a user share
# them. The demo's engine: 40,000 and 16,000 tokens/s. It counts only where prompts and texts grow apart.
PROMPT_TOKEN = 0.4
# Candidate lists that are scored while a text is encoded (docs/benchmarks.md, "Scoring": 5 ms and 28 us).
LISTS_PER_TEXT = 180
# A pass forward costs a third of a training step.
FORWARD = 1 / 3


@dataclass(frozen=True)
class Machine:
    """CPUs of all nodes, which tasks without a number in the recipe share; and GPUs."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Work:
    """Of one stage in one round.

    Attributes:
        amount: in `unit`.
        workers: that share it, each at the same rate.
        gpus: that are held while it runs.
    """

    amount: float
    unit: str
    workers: float = 1
    gpus: float = 0


def prepare(config: Config, sizes: Sizes, machine: Machine, round_id: int) -> Work:
    return Work(sizes.interactions, "interactions")


def bootstrap(config: Config, sizes: Sizes, machine: Machine, round_id: int) -> Work:
    section = config.bootstrap
    workers = section.num_workers
    return Work(section.num_users * section.epochs, "lessons", workers, workers * section.gpus_per_worker)


def _texts(config: Config, sizes: Sizes, prompts: float, texts: float) -> Work:
    """Texts from the source; in tokens where an LLM writes them."""
    section = config.generate
    gpus = section.gpus_per_engine * section.tensor_parallel_size * section.pipeline_parallel_size
    if config.llm.source != "vllm":
        gpus = 0.0
    if config.llm.source not in ("vllm", "openai"):
        return Work(texts, "texts", section.num_engines)
    tokens = texts * sizes.text_tokens + PROMPT_TOKEN * prompts * sizes.prompt_tokens
    return Work(tokens, "tokens", section.num_engines, section.num_engines * gpus)


def encode(config: Config, sizes: Sizes, machine: Machine, round_id: int) -> Work:
    """One text per user, several of test users, N of validation users behind a round; items in round 0 where an LLM describes
    them."""
    train = config.reward.reader_texts if not round_id and config.reads_own_texts else 1
    valid = config.generate.num_samples if round_id else 1
    items = sizes.items if not round_id and config.prompt.describe_items else 0
    texts = sizes.train * train + sizes.valid * valid + sizes.test * config.test_texts + items
    found = _texts(config, sizes, sizes.users + items, texts)
    encoders = config.encoder.num_workers
    if found.unit == "texts":  # then the encoders are what takes the time
        return Work(texts, "texts", encoders, encoders * config.encoder.gpus_per_worker)
    gpus = found.gpus + encoders * config.encoder.gpus_per_worker
    return Work(found.amount, found.unit, found.workers, gpus)


def references(config: Config, sizes: Sizes, machine: Machine, round_id: int) -> Work:
    texts = (sizes.train * config.reward.reader_texts + sizes.valid + sizes.test) * len(config.counted_texts)
    workers = config.encoder.num_workers
    return Work(texts, "texts", workers, workers * config.encoder.gpus_per_worker)


def sampled_users(config: Config, sizes: Sizes, turn: int) -> float:
    """Users that a turn samples."""
    users = turn_users(config, turn)
    return sizes.train * users.train_share + sizes.valid * users.valid_share


def generate(config: Config, sizes: Sizes, machine: Machine, round_id: int) -> Work:
    users = sampled_users(config, sizes, round_id)
    return _texts(config, sizes, users, users * config.generate.num_samples)


def score(config: Config, sizes: Sizes, machine: Machine, round_id: int) -> Work:
    """Every sample is encoded, and scored on its user's lists with their redraws."""
    texts = sampled_users(config, sizes, round_id) * config.generate.num_samples
    lists = sizes.lists_per_user * (1 + config.reward.num_redraws) * (1 + config.reward.personal)
    workers = config.encoder.num_workers
    gpus = (
        workers * config.encoder.gpus_per_worker + config.reward.num_scorers * config.reward.gpus_per_worker
    )
    return Work(texts * (1 + lists / LISTS_PER_TEXT), "texts", workers, gpus)


def pair(config: Config, sizes: Sizes, machine: Machine, round_id: int) -> Work:
    return Work(sampled_users(config, sizes, round_id) * config.generate.num_samples, "samples")


def best_of_n(config: Config, sizes: Sizes, machine: Machine, round_id: int) -> Work:
    """The best texts of training users, and an evaluation on held-out users' per epoch."""
    section = config.policy
    trained = sizes.train * turn_users(config, round_id).train_share
    rows = section.epochs * (trained + _heldout_users(config, sizes, round_id) * FORWARD)
    tokens = _group_tokens(config, sizes, config.best_of_n.top)
    return Work(rows * tokens, "tokens", section.num_workers, section.num_workers * section.gpus_per_worker)


def grpo(config: Config, sizes: Sizes, machine: Machine, round_id: int) -> Work:
    """All texts of training users, an evaluation on held-out users' per epoch, and the passes over everybody's before."""
    section, users = config.policy, sizes.train * turn_users(config, round_id).train_share
    evaluated = _heldout_users(config, sizes, round_id) * FORWARD
    rows = section.epochs * (users + evaluated)
    moved = config.reference_of(round_id) != round_id - 1
    passes = sum(LEARNERS["grpo"].stored(config, moved))
    if section.reference == "lora_off":
        rows += section.epochs * (users * FORWARD + evaluated)
    rows += passes * sampled_users(config, sizes, round_id) * FORWARD
    tokens = _group_tokens(config, sizes, config.generate.num_samples)
    return Work(rows * tokens, "tokens", section.num_workers, section.num_workers * section.gpus_per_worker)


def _heldout_users(config: Config, sizes: Sizes, turn: int) -> float:
    """Validation users that the training is evaluated on."""
    there = sizes.valid * turn_users(config, turn).valid_share
    return min(there, config.policy.max_heldout_users or there)


def _group_tokens(config: Config, sizes: Sizes, texts: int) -> float:
    """Tokens of a prompt with so many texts."""
    return sizes.prompt_tokens * (1 if config.policy.prefix_sharing else texts) + texts * sizes.text_tokens


def dpo(config: Config, sizes: Sizes, machine: Machine, round_id: int) -> Work:
    """Training, the reference's pass over all pairs, and an evaluation on the held-out ones per epoch."""
    section = config.policy
    tokens = sizes.prompt_tokens * (1 if section.prefix_sharing else 2) + 2 * sizes.text_tokens
    users = turn_users(config, round_id)
    pairs = sizes.pairs / config.run.turns_per_round
    if config.run.keep_pairs:
        pairs *= round_id
    heldout = sizes.heldout_pairs * users.valid_share / users.share
    reference = (pairs + heldout) * FORWARD
    if section.reference == "lora_off":
        reference *= section.epochs
    steps = pairs * section.epochs + section.epochs * heldout * FORWARD + reference
    return Work(steps * tokens, "tokens", section.num_workers, section.num_workers * section.gpus_per_worker)


def validate(config: Config, sizes: Sizes, machine: Machine, round_id: int) -> Work:
    texts = 2 * sizes.valid * config.generate.num_samples
    return Work(texts, "texts", 1, config.reward.gpus_per_worker)


def train_reward(config: Config, sizes: Sizes, machine: Machine, round_id: int) -> Work:
    section, folds = config.reward, config.reward.num_folds
    of_fold = 1 - 1 / folds if folds > 1 else 1
    epochs = config.reranker.of(config.reranker.backbone).total_epochs(1, 1) + 1
    amount = sizes.lists * sizes.train / sizes.users * of_fold * epochs * folds
    if section.num_workers > 1:
        return Work(amount, "list epochs", section.num_workers, section.num_workers * section.gpus_per_worker)
    return _tasks(amount, folds, section.gpus_per_worker, machine)


def evaluate(config: Config, sizes: Sizes, machine: Machine, round_id: int) -> Work:
    reading = len(config.run.round_ends(round_id)) + len(
        [one for one in config.evaluate.references if one != config.llm.source]
    )
    amount, tasks = 0.0, 0
    for backbone in config.evaluated_backbones:
        section = config.reranker.of(backbone)
        # One more each: a regression, or the metrics on the test lists.
        epochs = section.total_epochs(1, reading) + 1 + reading
        amount += config.evaluate.num_seeds * epochs * sizes.lists * sizes.train / sizes.users
        tasks += config.evaluate.num_seeds * (1 + reading if section.knowledge == "input" else 1)
    return _tasks(amount, tasks, config.evaluate.gpus_per_task, machine)


def _tasks(amount: float, tasks: int, gpus_per_task: float, machine: Machine) -> Work:
    """Equal tasks with one CPU each. With 3 tasks for 2 places, one place is idle for half of the time."""
    places = machine.cpus
    if gpus_per_task:
        places = min(places, machine.gpus / gpus_per_task)
    at_once = min(tasks, max(1, math.floor(places)))
    return Work(amount, "list epochs", tasks / math.ceil(tasks / at_once), at_once * gpus_per_task)


WORK: dict[str, Callable[[Config, Sizes, Machine, int], Work]] = {
    "prepare": prepare,
    "bootstrap": bootstrap,
    "encode": encode,
    "references": references,
    "train_reward": train_reward,
    "generate": generate,
    "score": score,
    "pair": pair,
    "dpo": dpo,
    "best_of_n": best_of_n,
    "grpo": grpo,
    "validate": validate,
    "evaluate": evaluate,
}
