"""Where texts come from: one writer per `llm.source`, built inside an actor, and what such an actor occupies.

To add a source: a class that writes (`TextWriter`), a function that says how it is built, one line in `SOURCES`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.datasets.files import absolute, file_identity
from dpo4rec_ray.knowledge.generator import (
    Answer,
    Completion,
    EngineDied,
    EngineSettings,
    EngineStats,
    Sampling,
    VLLMGenerator,
)
from dpo4rec_ray.knowledge.prompts import (
    FACTORS,
    clean_text,
    control_tokens,
    encode_chat,
    fit_history,
    item_prompt,
    user_prompt,
)
from dpo4rec_ray.knowledge.remote import ApiKey, Endpoint, EndpointSettings
from dpo4rec_ray.knowledge.statistics import StatisticsGenerator
from dpo4rec_ray.knowledge.structured import factor_schema
from dpo4rec_ray.knowledge.template import TemplateGenerator
from dpo4rec_ray.knowledge.text_table import TextTable, place_texts
from dpo4rec_ray.knowledge.watchdog import Watchdog
from dpo4rec_ray.policy.model import load_tokenizer
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.policies import merges_lora, policy_weights
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.texts.engines import KeptGenerator, kept_engines
from dpo4rec_ray.workers.placement import WORKER_ENV, engine_env

Row = dict[str, Any]


@dataclass(frozen=True)
class Texts:
    """What a source wrote about one user or item.

    Attributes:
        prompt_token_ids: empty where the source reads no prompt.
        reason: why there are no samples: prompt_too_long, engine_error, ...; detail: in words.
        num_left_out: of the oldest events, for which the prompt had no room.
        usage: what the source itself counted (throughput.COUNTS), tokens included where it gives no ids of them.
    """

    prompt_token_ids: list[int]
    samples: list[Completion]
    reason: str = ""
    detail: str = ""
    num_left_out: int = 0
    usage: Mapping[str, int] = field(default_factory=Counter)


class TextWriter(Protocol):
    """A source inside an actor. Both methods are called from several threads."""

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Texts]:
        """`counts` texts about each row of the `users` table."""
        ...

    def items(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Texts]:
        """One text about each row of the `items` table; asked for only where `Source.items` says so."""
        ...

    def stats(self) -> EngineStats | None:
        """Of the engine, where there is one."""
        ...


class _Plain:
    """What writers without an engine have in common."""

    def items(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Texts]:
        raise NotImplementedError

    def stats(self) -> EngineStats | None:
        return None


class CataloguePrompts:
    """Users and items -> prompt text, with the whole catalogue at hand, cleaned of control tokens once."""

    def __init__(
        self,
        items: pa.Table,
        special_tokens: Sequence[str],
        factors: str,
        item_attributes: bool,
        ratings: bool = True,
        as_json: bool = False,
    ):
        tokens = tuple(special_tokens)

        def clean(text: str) -> str:
            return clean_text(text, tokens)

        self._clean, self._ratings, self._as_json = clean, ratings, as_json
        self.factors = FACTORS[factors]
        self._titles = [clean(title) for title in items["title"].to_pylist()]
        rows = items["attributes"].to_pylist() if item_attributes else None
        self._attributes = rows and [[clean(value) for value in row] for row in rows]

    def text(self, profile: str, item_ids: Sequence[int], ratings: Sequence[float], skip: int = 0) -> str:
        """The prompt of one user with this knowledge history, without its `skip` oldest events."""
        item_ids, ratings = item_ids[skip:], ratings[skip:]
        titles = [self._titles[item] for item in item_ids]
        attributes = [self._attributes[item] for item in item_ids] if self._attributes else None
        return user_prompt(
            self._clean(profile),
            titles,
            ratings,
            attributes,
            self.factors,
            show_ratings=self._ratings,
            as_json=self._as_json,
        )

    def item(self, title: str, attributes: Sequence[str]) -> str:
        """The prompt of one item."""
        cleaned = [self._clean(value) for value in attributes]
        return item_prompt(self._clean(title), cleaned, self.factors, as_json=self._as_json)


@dataclass(frozen=True)
class PromptSettings:
    """How prompts are made; the arguments of `CataloguePrompts` without the catalogue."""

    factors: str
    item_attributes: bool
    ratings: bool
    as_json: bool

    @classmethod
    def of(cls, config: Config) -> PromptSettings:
        section = config.prompt
        as_json = config.generate.format == "json"
        return cls(section.factors, section.item_attributes, section.ratings, as_json)

    def over(self, store: RunDir, special_tokens: Sequence[str]) -> CataloguePrompts:
        items = store.read("items", columns=["title", "attributes"])
        return CataloguePrompts(
            items, special_tokens, self.factors, self.item_attributes, self.ratings, self.as_json
        )


class Generator(Protocol):
    """What `PolicyTexts` needs of an engine: a `VLLMGenerator` here, or a `KeptGenerator` elsewhere."""

    max_prompt: int

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], num_samples: Sequence[int]
    ) -> list[Answer]: ...

    def stats(self) -> EngineStats: ...


def engine_here(
    last_words: Path, *, engine: EngineSettings, sampling: Sampling, stall_timeout_s: float
) -> VLLMGenerator:
    """An engine in this process, with a watchdog beside it."""
    watchdog = Watchdog(stall_timeout_s, last_words)
    return VLLMGenerator(engine, sampling, alive=watchdog.alive, idle=watchdog.idle)


class PolicyTexts:
    """Texts that a policy writes under vLLM."""

    def __init__(
        self,
        store: RunDir,
        *,
        tokenizer_path: str,
        prompts: PromptSettings,
        generator: Callable[[Path], Generator],
        last_words: Path,
    ):
        """generator: makes the engine, or finds one; takes the file for its last words."""
        self._tokenizer = load_tokenizer(tokenizer_path)
        self._lock = threading.Lock()  # a fast tokenizer is not to be used by two threads
        self._prompts = prompts.over(store, control_tokens(self._tokenizer))
        self._last_words = last_words
        self._generator = generator(last_words)

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Texts]:
        prompts: list[list[int]] = []
        left_out: list[int] = []
        for row in rows:
            events = (row["profile"], row["history_item_ids"], row["history_ratings"])

            def encode(skip: int, events: tuple[Any, ...] = events) -> list[int]:
                return self._encode(self._prompts.text(*events, skip=skip))

            token_ids, skipped = fit_history(encode, len(events[1]), self._generator.max_prompt)
            prompts.append(token_ids)
            left_out.append(skipped)
        return self._answers(prompts, left_out, seeds, counts)

    def items(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Texts]:
        prompts = [self._encode(self._prompts.item(row["title"], row["attributes"])) for row in rows]
        return self._answers(prompts, [0] * len(rows), seeds, [1] * len(rows))

    def stats(self) -> EngineStats:
        return self._generator.stats()

    def _encode(self, text: str) -> list[int]:
        with self._lock:
            return encode_chat(self._tokenizer, text)

    def _answers(
        self, prompts: list[list[int]], left_out: list[int], seeds: Sequence[int], counts: Sequence[int]
    ) -> list[Texts]:
        try:
            answers = self._generator.generate(prompts, seeds, counts)
        except EngineDied as error:
            with contextlib.suppress(OSError):
                self._last_words.write_text(str(error))
            os._exit(1)  # Ray starts a new actor and retries; an exception would end the job
        return [
            Texts(prompt, answer.samples, answer.reason, answer.detail, skipped)
            for prompt, answer, skipped in zip(prompts, answers, left_out, strict=True)
        ]


class StatisticsTexts(_Plain):
    """Texts counted from the histories; no model is loaded."""

    def __init__(self, store: RunDir, *, like_at: float | None):
        items = store.read("items", columns=["title", "attributes"])
        self._generator = StatisticsGenerator(
            items["title"].to_pylist(), items["attributes"].to_pylist(), like_at
        )

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Texts]:
        items, ratings = ([row[name] for row in rows] for name in ("history_item_ids", "history_ratings"))
        return [Texts([], samples) for samples in self._generator.generate(items, ratings, seeds, counts)]


class TemplateTexts(_Plain):
    """Filled-in sentences: simulated."""

    def __init__(self, store: RunDir):
        self._generator = TemplateGenerator()

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Texts]:
        items = [row["history_item_ids"] for row in rows]
        return [Texts([], samples) for samples in self._generator.generate(items, seeds, counts)]


class EndpointTexts(_Plain):
    """Texts that an OpenAI-compatible endpoint writes."""

    def __init__(
        self, store: RunDir, *, prompts: PromptSettings, endpoint: EndpointSettings, sampling: Sampling
    ):
        self._prompts = prompts.over(store, ())
        self._endpoint = Endpoint(endpoint, sampling)

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Texts]:
        skips = [0] * len(rows)
        found = self._texts([self._prompt(row, 0) for row in rows], seeds, counts)
        # Nobody here knows the endpoint's tokens: what it finds too long is asked again with half of the events.
        while long := [
            i
            for i, (one, row) in enumerate(zip(found, rows, strict=True))
            if one.reason == "prompt_too_long" and skips[i] < len(row["history_item_ids"])
        ]:
            for i in long:
                events = len(rows[i]["history_item_ids"])
                skips[i] = events - (events - skips[i]) // 2
            again = self._texts(
                [self._prompt(rows[i], skips[i]) for i in long],
                [seeds[i] for i in long],
                [counts[i] for i in long],
            )
            for i, one in zip(long, again, strict=True):
                found[i] = replace(
                    one, num_left_out=skips[i], usage=Counter(found[i].usage) + Counter(one.usage)
                )
        return found

    def _prompt(self, row: Row, skip: int) -> str:
        return self._prompts.text(row["profile"], row["history_item_ids"], row["history_ratings"], skip)

    def items(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Texts]:
        prompts = [self._prompts.item(row["title"], row["attributes"]) for row in rows]
        return self._texts(prompts, seeds, [1] * len(rows))

    def _texts(self, prompts: Sequence[str], seeds: Sequence[int], counts: Sequence[int]) -> list[Texts]:
        answers = self._endpoint.generate(prompts, seeds, counts)
        return [Texts([], one.samples, one.reason, one.detail, usage=one.usage) for one in answers]


class TableTexts(_Plain):
    """Texts written elsewhere, as `place_texts` laid them out."""

    def __init__(self, store: RunDir, *, users_file: Path, items_file: Path | None):
        self._users = TextTable(users_file)
        self._items = TextTable(items_file) if items_file else None

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Texts]:
        return [
            _of_table(self._users, row["user_id"], count) for row, count in zip(rows, counts, strict=True)
        ]

    def items(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Texts]:
        assert self._items is not None
        return [_of_table(self._items, row["item_id"], 1) for row in rows]


def _of_table(table: TextTable, subject_id: int, count: int) -> Texts:
    """The first `count` texts of a subject."""
    samples = [Completion([], text, "stop") for text in table.of(subject_id, count)]
    if not samples:
        return Texts([], [], "no_text")
    return Texts([], samples, detail=f"{len(samples)} of {count} texts" if len(samples) < count else "")


@dataclass(frozen=True)
class Source:
    """How an actor builds its `TextWriter`, and what it occupies beside its share of CPUs.

    items: whether it writes about items too. batch: samples that it works on at once; 0: no more than it is given.
    """

    build: Callable[..., TextWriter]
    num_gpus: float = 0.0
    num_cpus: float | None = None  # None: generate.cpus_per_engine
    env: dict[str, str] = field(default_factory=lambda: WORKER_ENV)
    items: bool = False
    batch: int = 0
    dies: bool = False  # an engine in the actor's own process may end it


VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values vLLM takes for max_lora_rank


def engine_settings(config: Config, store: RunDir, policy_round: int) -> EngineSettings:
    """The engine that serves policy `policy_round`."""
    weights = policy_weights(config, store, policy_round)
    section = config.generate
    return EngineSettings(
        model=weights.merged or weights.base,
        adapter=weights.lora if weights.merged is None else None,
        dtype=config.llm.dtype,
        max_model_len=config.llm.max_model_len,
        on_gpu=section.gpus_per_engine > 0,
        gpu_memory_utilization=section.gpu_memory_utilization,
        tensor_parallel_size=section.tensor_parallel_size,
        pipeline_parallel_size=section.pipeline_parallel_size,
        lora=section.keep_engines and not merges_lora(config),  # for policies that are still to come
        max_num_seqs=section.max_num_seqs,
        max_lora_rank=next(rank for rank in VLLM_LORA_RANKS if rank >= config.dpo.lora_rank),
        extra=section.engine_args,
    )


def sampling_of(config: Config) -> Sampling:
    section = config.generate
    factors = FACTORS[config.prompt.factors]
    schema = factor_schema(factors, section.max_new_tokens) if section.format == "json" else None
    return Sampling(section.temperature, section.top_p, section.max_new_tokens, schema)


def _policy_source(config: Config, store: RunDir, policy_round: int) -> Source:
    section = config.generate
    engine, sampling = engine_settings(config, store, policy_round), sampling_of(config)
    env, num_gpus, num_cpus = engine_env(config), section.gpus_per_engine, None
    if section.keep_engines:
        actors = kept_engines(config, engine, sampling, store.root)
        serving = (engine.model, engine.adapter)
        generator: Callable[[Path], Generator] = partial(_kept_generator, engines=actors, serving=serving)
        env, num_gpus, num_cpus = WORKER_ENV, 0.0, 0.1  # only prompts and files are left to do
    else:
        generator = partial(
            engine_here, engine=engine, sampling=sampling, stall_timeout_s=section.stall_timeout_s
        )
    build = partial(
        PolicyTexts,
        tokenizer_path=policy_weights(config, store, policy_round).base,
        prompts=PromptSettings.of(config),
        generator=generator,
    )
    return Source(build, num_gpus, num_cpus, env, items=True, batch=section.max_num_seqs, dies=True)


def _kept_generator(
    last_words: Path, *, engines: list[Any], serving: tuple[str, str | None]
) -> KeptGenerator:
    import ray

    actor = ray.get_runtime_context().get_actor_id()  # the same after a restart
    return KeptGenerator(engines, serving, actor or "driver")


def _statistics_source(config: Config, store: RunDir, policy_round: int) -> Source:
    return Source(
        partial(StatisticsTexts, like_at=config.data.positive_rating if config.prompt.ratings else None)
    )


def _template_source(config: Config, store: RunDir, policy_round: int) -> Source:
    return Source(TemplateTexts)


def _openai_source(config: Config, store: RunDir, policy_round: int) -> Source:
    section, num_samples = config.openai, config.generate.num_samples
    endpoint = EndpointSettings(
        base_url=section.base_url,
        model=section.model,
        # By value: Ray writes the environment that it gives to workers into its logs.
        key=ApiKey(os.environ.get(section.api_key_env, "")),
        key_name=section.api_key_env,
        max_concurrency=max(1, section.max_concurrency // config.generate.num_engines),
        samples_per_request=section.samples_per_request,
        max_retries=section.max_retries,
        timeout_s=section.timeout_s,
    )
    build = partial(
        EndpointTexts, prompts=PromptSettings.of(config), endpoint=endpoint, sampling=sampling_of(config)
    )
    batch = endpoint.max_concurrency * min(section.samples_per_request or num_samples, num_samples)
    return Source(build, items=True, batch=batch)


def _table_source(config: Config, store: RunDir, policy_round: int) -> Source:
    """Lays the files' texts out in the run folder, where actors on any machine find them; says what is wrong with them."""
    section, folder = config.texts, store.root / "texts"
    files: dict[str, Path | None] = {"users_file": None, "items_file": None}
    for subject, path, column in (
        ("user", section.users, section.user),
        ("item", section.items, section.item),
    ):
        if not path:
            continue
        known = store.read(f"{subject}s", columns=[f"{subject}_id", "raw_id"])
        columns = (column, section.text)
        made_from = (file_identity(absolute(path)), *columns, store.require(f"{subject}s").produced)
        target = folder / f"{subject}s.arrow"
        tally = place_texts(
            path,
            columns,
            known["raw_id"].combine_chunks(),
            known[f"{subject}_id"].to_numpy(),
            target,
            "\n".join(made_from),
        )
        if tally is not None and tally.left_out:
            say(f"  texts.{subject}s {path}: {tally.texts} texts, left out: {tally.words}")
        files[f"{subject}s_file"] = target
    return Source(partial(TableTexts, **files), items=bool(section.items))


# llm.source -> what writes the texts of policy `policy_round`
SOURCES: dict[str, Callable[[Config, RunDir, int], Source]] = {
    "vllm": _policy_source,
    "openai": _openai_source,
    "table": _table_source,
    "statistics": _statistics_source,
    "template": _template_source,
}


def describes_items(config: Config) -> bool:
    """Whether items get texts of their own from the source."""
    return config.prompt.describe_items or (config.llm.source == "table" and bool(config.texts.items))


def cost_of(config: Config, counts: Mapping[str, int]) -> dict[str, float]:
    """{"cost": ...} of an endpoint's tokens, in the currency of the prices; empty where there is no price."""
    section = config.openai
    if config.llm.source != "openai" or not (section.input_price or section.output_price):
        return {}
    cost = section.input_price * counts["prompt_tokens"] + section.output_price * counts["tokens"]
    return {"cost": round(cost / 1e6, 6)}
