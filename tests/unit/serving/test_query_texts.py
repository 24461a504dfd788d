"""Texts in place of users (serving.query = "text"): which versions answer them, how many wait, and what a shadow reads."""

from __future__ import annotations

import asyncio
import json
import shutil
import time

import numpy as np
import pytest
from starlette.testclient import TestClient

from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.encoder import TextEncoder
from dpo4rec_ray.serving.batcher import Overloaded
from dpo4rec_ray.serving.http import build_api
from dpo4rec_ray.serving.query_texts import MAX_BATCH, MAX_WAITING
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.rerank_shapes import DocumentsRequest
from dpo4rec_ray.serving.service import Service
from dpo4rec_ray.serving.version_files import ENCODER_FILE, VERSION_FILE
from dpo4rec_ray.store.artifacts import RunDir
from tests.serving_world import MAX_BODY, requests_of

V2 = "/v2/rerank"
BODY = {"query": "likes westerns", "documents": ["i1", "i2", "i3"]}


def test_versions_that_cannot_read_a_text(registry: Registry) -> None:
    """The server does not start on one alone; one that is promoted later is refused as a broken one is."""
    settings = ServingSection.model_construct(query="text")
    service = Service(registry, settings)
    client = TestClient(build_api(service, frozenset(), MAX_BODY))
    (registry.folder("v2") / ENCODER_FILE).unlink()
    (registry.folder("mir") / ENCODER_FILE).write_text('{"path": "x", "of_later_code": 1}')
    for name, words in (
        ("v3", "reads no texts"),
        ("v2", "publish its run again"),
        ("mir", "encoder.json: cannot be read"),
    ):
        registry.promote(name)
        assert not service.manager.refresh() and words in service.manager.refused
        answer = client.post(V2, json=BODY)
        assert answer.status_code == 200 and answer.json()["model"] == "v1"
        assert Service(registry, settings).manager.loaded.routing.current == "v1", "as a new replica starts"
    alone = Registry(registry.root.with_name("alone"))
    shutil.copytree(registry.folder("v3"), alone.folder("v3"))
    alone.promote("v3")
    with pytest.raises(UserError, match="version v3 reads no texts"):
        Service(alone, settings)


def test_texts_that_would_wait_too_long_are_refused(
    published: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding takes longer than ranking: its queue is bounded too, and texts that wait are encoded together."""
    encoded: list[int] = []
    service = Service(published, ServingSection.model_construct(query="text"))
    dim = service.manager.version_for("", None).files.vector_dim

    def encode(_: object, texts: list[str]) -> np.ndarray:
        encoded.append(len(texts))
        time.sleep(0.02)
        return np.ones((len(texts), dim), np.float32)

    monkeypatch.setattr(TextEncoder, "encode", encode)

    async def ask(number: int) -> bool:
        try:
            await service.rerank_query(DocumentsRequest(query=f"text {number}", documents=["i1", "i2"]), V2)
        except Overloaded:
            return False
        return True

    async def all_at_once() -> list[bool]:
        return await asyncio.gather(*map(ask, range(300)))

    answered = sum(asyncio.run(all_at_once()))
    assert MAX_WAITING <= answered <= MAX_WAITING + 2 * MAX_BATCH and sum(encoded) == answered
    assert len(encoded) <= answered / 8


def test_a_shadow_reads_the_text_of_a_query_itself(
    registry: Registry, served_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the version that answers gives the same first items."""
    twin = shutil.copytree(registry.folder("v1"), registry.folder("twin"))
    card = json.loads((twin / VERSION_FILE).read_text()) | {"version": "twin"}
    (twin / VERSION_FILE).write_text(json.dumps(card))
    registry.shadow("twin")
    service = Service(registry, ServingSection.model_construct(query="text"))
    compared: list[tuple[list[int], list[int]]] = []
    service.metrics.shadowed = lambda _, sent, other: compared.append(
        (sent.order.tolist(), other.order.tolist())
    )

    async def ask() -> None:
        for number, one in enumerate(requests_of(served_run)[:8]):
            body = DocumentsRequest(query=f"likes things as number {number}", documents=one["candidates"])
            await service.rerank_query(body, V2)
        await asyncio.gather(*service._shadows)

    encoded: list[int] = []
    real = TextEncoder.encode

    def counted(self: TextEncoder, texts: list[str]) -> np.ndarray:
        encoded.append(len(texts))
        return real(self, texts)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    asyncio.run(ask())
    assert len(compared) == 8 and all(sent == other for sent, other in compared)
    assert sum(encoded) == 8, "the same encoder reads a text once"


def test_a_shadow_with_another_encoder_takes_no_place(
    registry: Registry, served_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.shadow("v2")
    file = registry.folder("v2") / ENCODER_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_tokens": 8}))
    service = Service(registry, ServingSection.model_construct(query="text"))
    dim = service.manager.version_for("", None).files.vector_dim
    encoded: list[int] = []

    def encode(_: object, texts: list[str]) -> np.ndarray:
        encoded.append(len(texts))
        time.sleep(0.01)
        return np.ones((len(texts), dim), np.float32)

    monkeypatch.setattr(TextEncoder, "encode", encode)

    async def ask() -> None:
        bodies = [
            DocumentsRequest(query=f"text {number}", documents=["i1", "i2"]) for number in range(MAX_WAITING)
        ]
        await asyncio.gather(*(service.rerank_query(body, V2) for body in bodies))
        await asyncio.gather(*service._shadows)

    asyncio.run(ask())
    assert MAX_WAITING <= sum(encoded) < 2 * MAX_WAITING, (
        "no answer was refused, and most shadows were left out"
    )
