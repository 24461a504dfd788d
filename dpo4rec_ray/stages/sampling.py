"""Actors that turn a shard of users into texts. Shared by generate and encode.

What writes the texts is made in the actor's constructor: a policy (prompts, then an engine), or one of the other
`SOURCES` that llm.source names. On a fatal engine error the process ends, so that Ray starts a new actor and retries
the shard there, a few times at most.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from dpo4rec_ray.artifacts import RunDir, write_json, write_part
from dpo4rec_ray.config import Config
from dpo4rec_ray.knowledge.generator import Completion, EngineSettings, Sampling, VLLMGenerator
from dpo4rec_ray.knowledge.prompts import FACTORS, clean_text, control_tokens, encode_chat, user_prompt
from dpo4rec_ray.knowledge.statistics import StatisticsGenerator
from dpo4rec_ray.policy.model import load_tokenizer
from dpo4rec_ray.stages.common import WORKER_ENV, engine_env, policy_weights, seed_of
from dpo4rec_ray.stages.shards import Pool, Row


class CataloguePrompts:
    """Users -> prompt text, with the whole catalogue's titles at hand, cleaned of control tokens once."""

    def __init__(
        self,
        items: pa.Table,
        special_tokens: Sequence[str],
        factors: str,
        item_attributes: bool,
        ratings: bool = True,
    ):
        def clean(text: str) -> str:
            return clean_text(text, special_tokens)

        self._clean, self._factors, self._ratings = clean, FACTORS[factors], ratings
        self._titles = [clean(title) for title in items["title"].to_pylist()]
        rows = items["attributes"].to_pylist() if item_attributes else None
        self._attributes = rows and [[clean(value) for value in row] for row in rows]

    def text(self, profile: str, item_ids: Sequence[int], ratings: Sequence[float]) -> str:
        """The prompt of one user with this knowledge history."""
        titles = [self._titles[item] for item in item_ids]
        attributes = [self._attributes[item] for item in item_ids] if self._attributes else None
        about = self._clean(profile)
        return user_prompt(about, titles, ratings, attributes, self._factors, show_ratings=self._ratings)


class TextWriter(Protocol):
    """What a source of texts is inside an actor: users of the `users` table in, texts out."""

    def __call__(
        self, users: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]
    ) -> tuple[list[list[int]], list[list[Completion]]]:
        """Per user the prompt's token ids, empty where there is no prompt, and `counts` completions."""
        ...


class PolicyTexts:
    """Texts that a policy writes under vLLM."""

    def __init__(
        self,
        store: RunDir,
        *,
        tokenizer_path: str,
        factors: str,
        item_attributes: bool,
        ratings: bool,
        engine: EngineSettings,
        sampling: Sampling,
    ):
        self._tokenizer = load_tokenizer(tokenizer_path)
        items = store.read("items", columns=["title", "attributes"])
        self._prompts = CataloguePrompts(
            items, control_tokens(self._tokenizer), factors, item_attributes, ratings
        )
        self._generator = VLLMGenerator(engine, sampling)

    def __call__(
        self, users: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]
    ) -> tuple[list[list[int]], list[list[Completion]]]:
        texts = [
            self._prompts.text(user["profile"], user["history_item_ids"], user["history_ratings"])
            for user in users
        ]
        prompts = [encode_chat(self._tokenizer, text) for text in texts]
        try:
            return prompts, self._generator.generate(prompts, seeds, counts)
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                os._exit(
                    1
                )  # Ray starts a new actor with a new engine and retries; an exception would end the job
            raise


class StatisticsTexts:
    """Texts counted from the histories; no model is loaded."""

    def __init__(self, store: RunDir, *, like_at: float | None):
        items = store.read("items", columns=["title", "attributes"])
        self._generator = StatisticsGenerator(
            items["title"].to_pylist(), items["attributes"].to_pylist(), like_at
        )

    def __call__(
        self, users: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]
    ) -> tuple[list[list[int]], list[list[Completion]]]:
        items, ratings = ([user[name] for user in users] for name in ("history_item_ids", "history_ratings"))
        return [[] for _ in users], self._generator.generate(items, ratings, seeds, counts)


@dataclass(frozen=True)
class Source:
    """How an actor builds its `TextWriter`, and what it occupies beside its share of CPUs."""

    build: Callable[[RunDir], TextWriter]
    num_gpus: float = 0.0
    env: dict[str, str] = field(default_factory=lambda: WORKER_ENV)


class UserSampler:
    """Samples texts for the users of a shard from one source."""

    def __init__(
        self,
        store: RunDir,
        *,
        source: Source,
        seed: int,
        num_samples: dict[str, int],
        takes_part: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        """takes_part: user ids [n] -> bool [n]; None: all users do."""
        self._store, self._seed, self._num_samples = store, seed, num_samples
        self._takes_part = takes_part
        self._write = source.build(store)

    def sample(
        self, low: int, high: int
    ) -> tuple[list[int], list[list[int]], list[list[Completion]], list[int]]:
        """User ids, prompts, completions of the users in [low, high), and how many samples each should have."""
        table = self._store.read("users", split=tuple(self._num_samples), user_range=(low, high))
        if self._takes_part is not None:
            table = table.filter(pa.array(self._takes_part(table["user_id"].to_numpy())))
        users = table.to_pylist()
        counts = [self._num_samples[user["split"]] for user in users]
        ids = [user["user_id"] for user in users]
        seeds = [seed_of(self._seed, user_id) for user_id in ids]
        return ids, *self._write(users, seeds, counts), counts


class ShardGenerator(UserSampler):
    """Commits a shard's samples as one part of `generations`; users without all N samples are named, not written."""

    def __init__(self, store: RunDir, folder: str, round_id: int, **arguments: Any):
        super().__init__(store, **arguments)
        self._folder, self._round = folder, round_id

    def __call__(self, row: Row) -> Row:
        ids, prompts, answers, counts = self.sample(int(row["low"]), int(row["high"]))
        columns: dict[str, list[Any]] = {name: [] for name in _GENERATION_COLUMNS}
        failed: dict[str, str] = {}
        num_tokens = num_clipped = 0
        for user_id, prompt, samples, count in zip(ids, prompts, answers, counts, strict=True):
            reason = failure(samples, count)
            if reason:
                failed[str(user_id)] = reason
                continue
            for sample_id, sample in enumerate(samples):
                values = (
                    self._round,
                    user_id,
                    sample_id,
                    prompt,
                    sample.token_ids,
                    sample.text,
                    sample.finish_reason,
                )
                for name, value in zip(_GENERATION_COLUMNS, values, strict=True):
                    columns[name].append(value)
                num_tokens += len(sample.token_ids)
                num_clipped += sample.finish_reason == "length"
        shard = int(row["shard"])
        if failed:  # before the part: a part on disk means that the whole shard is accounted for
            write_json(Path(self._folder) / f"failed-{shard:05d}.json", failed)
        write_part(self._folder, "generations", pa.table(columns), shard)
        return {"shard": shard, "users": len(ids), "tokens": num_tokens, "clipped": num_clipped}


class TextSampler(UserSampler):
    """Hands a shard's texts on to the next pool."""

    def __call__(self, row: Row) -> Row:
        ids, _, answers, counts = self.sample(int(row["low"]), int(row["high"]))
        user_ids: list[int] = []
        sample_ids: list[int] = []
        texts: list[str] = []
        failed: list[int] = []
        for user_id, samples, count in zip(ids, answers, counts, strict=True):
            reason = failure(samples, count)
            if reason:
                # every user needs a vector: what is missing gets the empty text's, and the user is named
                failed.append(user_id)
            own = [sample.text for sample in samples]
            texts += own + [""] * (count - len(own))
            user_ids += [user_id] * count
            sample_ids += range(count)
        return {
            **row,
            "users": len(ids),
            "user_ids": user_ids,
            "sample_ids": sample_ids,
            "texts": texts,
            "failed": failed,
        }


VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values vLLM takes for max_lora_rank
_GENERATION_COLUMNS = (
    "round",
    "user_id",
    "sample_id",
    "prompt_token_ids",
    "token_ids",
    "text",
    "finish_reason",
)


def failure(samples: list[Completion], count: int) -> str:
    """Why a user's samples cannot be used; empty when they can."""
    if not samples:
        return "prompt_too_long"
    if len(samples) != count:
        return "missing_samples"
    return "empty_text" if any(not sample.text.strip() for sample in samples) else ""


def _policy_source(config: Config, store: RunDir, policy_round: int) -> Source:
    weights = policy_weights(config, store, policy_round)
    section = config.generate
    engine = EngineSettings(
        model=weights.merged or weights.base,
        adapter=weights.adapter if weights.merged is None else None,
        dtype=config.llm.dtype,
        max_model_len=config.llm.max_model_len,
        on_gpu=section.gpus_per_engine > 0,
        gpu_memory_utilization=section.gpu_memory_utilization,
        max_lora_rank=next(rank for rank in VLLM_LORA_RANKS if rank >= config.dpo.lora_rank),
    )
    build = partial(
        PolicyTexts,
        tokenizer_path=weights.base,
        factors=config.prompt.factors,
        item_attributes=config.prompt.item_attributes,
        ratings=config.prompt.ratings,
        engine=engine,
        sampling=Sampling(section.temperature, section.top_p, section.max_new_tokens),
    )
    return Source(build, section.gpus_per_engine, engine_env(config))


def _statistics_source(config: Config, store: RunDir, policy_round: int) -> Source:
    return Source(
        partial(StatisticsTexts, like_at=config.data.positive_rating if config.prompt.ratings else None)
    )


# llm.source -> what writes the texts of policy `policy_round`
SOURCES: dict[str, Callable[[Config, RunDir, int], Source]] = {
    "vllm": _policy_source,
    "statistics": _statistics_source,
}


def engine_pool(
    config: Config,
    store: RunDir,
    worker: type,
    policy_round: int,
    num_samples: dict[str, int],
    stage: str,
    **more: Any,
) -> Pool:
    """The pool that writes policy `policy_round`'s texts; `num_samples` says how many the users of each split get."""
    source = SOURCES[config.llm.source](config, store, policy_round)
    arguments = {
        "store": store,
        "source": source,
        "seed": seed_of(config.run.seed, stage, policy_round),
        "num_samples": num_samples,
        **more,
    }
    section = config.generate
    return Pool(
        worker,
        arguments,
        size=section.num_engines,
        num_cpus=section.cpus_per_engine,
        num_gpus=source.num_gpus,
        env=source.env,
    )
