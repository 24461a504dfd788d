"""A key that a section of the recipe gets is found in the component, with nothing else changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from dpo4rec_ray.config import default_config
from dpo4rec_ray.config.texts import (
    EncoderSection,
    GenerateSection,
    LLMSection,
    OpenAISection,
    PromptSection,
)
from dpo4rec_ray.knowledge.catalogue_prompts import CataloguePrompts
from dpo4rec_ray.knowledge.encoder import TextEncoder
from dpo4rec_ray.knowledge.engine_spec import ServedWeights
from dpo4rec_ray.knowledge.remote import ApiKey, Endpoint
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.texts.policy_texts import engine_spec
from dpo4rec_ray.texts.sampling import TextSampler, text_pool
from dpo4rec_ray.texts.vectors import VectorWriter, encoder_pool


class WiderGenerate(GenerateSection):
    new_key: int = 7


class WiderLLM(LLMSection):
    new_key: int = 7


class WiderPrompt(PromptSection):
    new_key: int = 7


class WiderOpenAI(OpenAISection):
    new_key: int = 7


class WiderEncoder(EncoderSection):
    new_key: int = 7


CONFIG = default_config(["llm.source=template"]).model_copy(
    update={"generate": WiderGenerate(), "llm": WiderLLM(source="template"), "encoder": WiderEncoder()}
)


def test_the_engine() -> None:
    spec = engine_spec(CONFIG, ServedWeights("model"), 0)
    assert spec.generate.new_key == spec.llm.new_key == 7


def test_the_prompts() -> None:
    items = pa.table({"title": ["Heat"], "attributes": [["genre: crime"]]})
    assert CataloguePrompts(items, (), WiderPrompt()).prompt.new_key == 7


def test_the_endpoint() -> None:
    endpoint = Endpoint(WiderOpenAI(), WiderGenerate(), ApiKey(""))
    assert endpoint.openai.new_key == endpoint.generation.new_key == 7


def test_the_encoder(tmp_path: Path, small_encoder: Callable[[Path], Path]) -> None:
    encoder = TextEncoder(WiderEncoder(path=str(small_encoder(tmp_path / "encoder")), batch_size=2), "cpu")
    assert encoder.section.new_key == 7
    vectors = encoder.encode(["a", "b and c", "a"])
    assert vectors.shape == (3, encoder.width) and (vectors[0] == vectors[2]).all()


def test_the_actors(tmp_path: Path) -> None:
    """The pools of generate and encode."""
    texts = text_pool(
        CONFIG,
        RunDir(tmp_path),
        TextSampler,
        stage="encode",
        round_id=0,
        policy_round=0,
        folder=str(tmp_path),
        samples_per_shard=1,
        num_samples={"train": 1},
    )
    assert texts.arguments["job"].config.generate.new_key == 7
    assert encoder_pool(CONFIG, VectorWriter).arguments["encoder"].new_key == 7
