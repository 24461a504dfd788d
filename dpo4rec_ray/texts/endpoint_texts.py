"""Texts that an OpenAI-compatible endpoint writes (llm.source = "openai")."""

from __future__ import annotations

import os
import re
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.catalogue_prompts import CataloguePrompts, ExampleUser
from dpo4rec_ray.knowledge.completions import Answer
from dpo4rec_ray.knowledge.prompts import Message, Prompt, messages
from dpo4rec_ray.knowledge.remote import ApiKey, Endpoint, requests_at_once
from dpo4rec_ray.knowledge.structured import json_schema
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.texts.examples import draw_examples
from dpo4rec_ray.texts.text_source import Row, TextWriter, WriterPlacement, catalogue


class EndpointTexts(TextWriter):
    """Prompts of users and items through an endpoint."""

    section = "openai"

    @classmethod
    def identity(cls, config: Config, store: RunDir) -> str:
        return f"openai {config.openai.model}"

    @classmethod
    def check(cls, config: Config) -> None:
        """What requests are made of. A value that may be a secret in the wrong place is not repeated."""
        section = config.openai
        if not section.model:
            raise UserError("openai.model is not set; give the name that the endpoint knows the model by")
        try:
            url = urllib.parse.urlsplit(section.base_url)
        except ValueError:
            url = urllib.parse.urlsplit("")
        if url.username or url.password or url.query:
            raise UserError(
                "openai.base_url carries a user name, password or query, which would end up in config.json; leave them out and "
                "put the key into the environment variable that openai.api_key_env names"
            )
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(
                f"openai.base_url = {section.base_url!r} is no http(s) address, such as http://127.0.0.1:8000/v1"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", section.api_key_env):
            raise UserError(
                "openai.api_key_env is no name of an environment variable; put the key itself into that variable"
            )
        if config.prompt.style == "completion" or config.prompt.lead_in not in ("auto", ""):
            raise UserError(
                'an endpoint of chat completions begins its answers itself: set prompt.style = "chat" and prompt.lead_in = ""'
            )
        key = os.environ.get(section.api_key_env, "")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"the environment variable {section.api_key_env} holds spaces, line ends or other characters that no key has"
            )

    @classmethod
    def placement(cls, config: Config, store: RunDir, policy_round: int) -> WriterPlacement:
        section, num_samples = config.openai, config.generate.num_samples
        # The key is an argument because Ray writes the environment of its workers into its logs.
        key = ApiKey(os.environ.get(section.api_key_env, ""))
        samples = min(section.samples_per_request or num_samples, num_samples)
        return WriterPlacement(
            cls,
            {"key": key, "examples": draw_examples(config, store)},
            batch=requests_at_once(section, config.generate) * samples,
        )

    def __init__(self, config: Config, store: RunDir, *, key: ApiKey, examples: Sequence[ExampleUser] = ()):
        self._prompts = CataloguePrompts.of_recipe(config, catalogue(store), examples)
        schema = json_schema(config.prompt, config.generate)
        self._endpoint = Endpoint(config.openai, config.generate_by(0), key, schema)
        self._asked_again = 0

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Answer]:
        skips = [0] * len(rows)
        found = self._endpoint.generate([self._prompt(row, 0) for row in rows], seeds, counts)
        # The endpoint's tokenizer is unknown here. A prompt that it finds too long is asked again with half of the events.
        while long := [
            i
            for i, (one, row) in enumerate(zip(found, rows, strict=True))
            if one.reason == "prompt_too_long" and skips[i] < len(row["history_item_ids"])
        ]:
            for i in long:
                events = len(rows[i]["history_item_ids"])
                skips[i] = events - (events - skips[i]) // 2
                self._asked_again += counts[i]
            again = self._endpoint.generate(
                [self._prompt(rows[i], skips[i]) for i in long],
                [seeds[i] for i in long],
                [counts[i] for i in long],
            )
            for i, one in zip(long, again, strict=True):
                usage = Counter(found[i].usage) + Counter(one.usage)
                found[i] = replace(one, num_left_out=skips[i], usage=usage)
        return found

    def finished(self) -> int:
        return self._endpoint.finished() - self._asked_again

    def items(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Answer]:
        system = self._prompts.wording.system
        prompts = [Prompt(self._prompts.item(row["title"], row["attributes"]), system=system) for row in rows]
        return self._endpoint.generate([messages(prompt) for prompt in prompts], seeds, counts)

    def _prompt(self, row: Row, skip: int) -> list[Message]:
        question = self._prompts.user(row["profile"], row["history_item_ids"], row["history_ratings"], skip)
        return messages(self._prompts.asked(question, row["user_id"]))
