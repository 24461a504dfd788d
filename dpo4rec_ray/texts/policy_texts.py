"""Texts that a policy writes under vLLM (llm.source = "vllm")."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.knowledge.catalogue_prompts import ExampleUser, TokenizedPrompts
from dpo4rec_ray.knowledge.completions import Answer
from dpo4rec_ray.knowledge.engine_loop import EngineDied, EngineStats
from dpo4rec_ray.knowledge.engine_spec import EngineSpec, ServedWeights
from dpo4rec_ray.knowledge.generator import VLLMGenerator
from dpo4rec_ray.knowledge.structured import json_schema
from dpo4rec_ray.policy.model import load_tokenizer
from dpo4rec_ray.storage.places import Place, write_text
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.policies import base_llm_path, merges_lora, model_identity, policy_weights
from dpo4rec_ray.texts.engines import KeptGenerator, begin_stage, kept_engines, start_engine
from dpo4rec_ray.texts.examples import draw_examples
from dpo4rec_ray.texts.text_source import Row, TextWriter, WriterPlacement, catalogue
from dpo4rec_ray.workers.placement import engine_env


def served_weights(config: Config, store: RunDir, policy_round: int) -> ServedWeights:
    """What an engine serves as policy `policy_round`."""
    weights = policy_weights(config, store, policy_round)
    if weights.merged:
        return ServedWeights(weights.merged)
    return ServedWeights(weights.base, weights.lora)


def engine_spec(config: Config, weights: ServedWeights, policy_round: int) -> EngineSpec:
    """The engine of the recipe that serves these weights, those of policy `policy_round`."""
    # An engine that is kept may serve the base LLM now and a LoRA in a later round.
    takes_lora = weights.lora is not None or (config.generate.keep_engines and not merges_lora(config))
    return EngineSpec(
        weights,
        config.llm,
        config.generate_by(policy_round),
        max_lora_rank=config.policy.lora_rank if takes_lora else 0,
        schema=json_schema(config.prompt, config.generate),
    )


def open_policy(
    config: Config,
    store: RunDir,
    *,
    spec: EngineSpec,
    tokenizer: str,
    reason_file: Place,
    examples: Sequence[ExampleUser] = (),
    engines: Sequence[Any] = (),
) -> PolicyTexts:
    """Take one of `engines` (actors of `KeptEngine`); if there are none, start one here with a watchdog beside it."""
    prompts = TokenizedPrompts.of_recipe(config, load_tokenizer(tokenizer), catalogue(store), examples)
    if engines:
        import ray

        owner = ray.get_runtime_context().get_actor_id() or "driver"  # the same after a restart
        generator: VLLMGenerator | KeptGenerator = KeptGenerator(engines, spec.weights, owner)
    else:
        generator = start_engine(spec, reason_file)
    return PolicyTexts(prompts, generator, reason_file)


class PolicyTexts(TextWriter):
    """Prompts of users and items through an engine. If the engine dies, this process ends too."""

    @classmethod
    def check(cls, config: Config) -> None:
        """Engine, model and training are checked by checks.py, which knows the installed vLLM."""

    @classmethod
    def identity(cls, config: Config, store: RunDir) -> str:
        """Of policy 0: the bootstrap's production, a local folder's content, or a hub name with its commit."""
        if config.llm.path == "bootstrap":
            return store.require("base_llm").produced
        return model_identity(base_llm_path(config, store))

    @classmethod
    def placement(cls, config: Config, store: RunDir, policy_round: int) -> WriterPlacement:
        """Policy `policy_round` in an engine of the actor's own, or in one that outlives the stage (keep_engines)."""
        section = config.generate
        spec = engine_spec(config, served_weights(config, store, policy_round), policy_round)
        arguments = {
            "spec": spec,
            "tokenizer": policy_weights(config, store, policy_round).base,
            "examples": draw_examples(config, store),
        }
        if section.keep_engines:
            # The actor itself only makes prompts and writes files; on CPUs it holds its engine's share of them.
            arguments["engines"] = engines = kept_engines(config, spec, store.root)
            return WriterPlacement(
                open_policy,
                arguments,
                num_cpus=0.1 if section.gpus_per_engine else None,
                batch=section.max_num_seqs,
                dies=True,
                prepare=partial(begin_stage, engines),
                kept=True,
            )
        return WriterPlacement(
            open_policy,
            arguments,
            num_gpus=section.gpus_per_engine,
            env=engine_env(config),
            batch=section.max_num_seqs,
            dies=True,
        )

    def __init__(
        self, prompts: TokenizedPrompts, generator: VLLMGenerator | KeptGenerator, reason_file: Place
    ):
        """reason_file: where the reason of an engine's death is written."""
        self._prompts, self._generator, self._reason_file = prompts, generator, reason_file

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Answer]:
        prompts = [
            self._prompts.user(
                row["profile"], row["history_item_ids"], row["history_ratings"], row["user_id"]
            )
            for row in rows
        ]
        return self._answers(prompts, seeds, counts)

    def items(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Answer]:
        prompts = [(self._prompts.item(row["title"], row["attributes"]), 0) for row in rows]
        return self._answers(prompts, seeds, counts)

    def stats(self) -> EngineStats:
        return self._generator.stats()

    def finished(self) -> int:
        return self._generator.finished()

    def _answers(
        self, prompts: Sequence[tuple[list[int], int]], seeds: Sequence[int], counts: Sequence[int]
    ) -> list[Answer]:
        try:
            answers = self._generator.generate([token_ids for token_ids, _ in prompts], seeds, counts)
        except EngineDied as error:
            with contextlib.suppress(OSError):
                write_text(self._reason_file, str(error))
            os._exit(1)  # Ray starts a new actor and repeats the shard; an exception would end the job
        return [
            replace(answer, prompt_token_ids=token_ids, num_left_out=num_left_out)
            for (token_ids, num_left_out), answer in zip(prompts, answers, strict=True)
        ]
