"""The Ray Serve application: `build` is what jobs/serve.py runs and what a config file for `serve deploy` names."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve import Application

from dpo4rec_ray.config import ServingSection, first_mistake
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.figures import Figures
from dpo4rec_ray.serving.http import build_api
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.service import Service

NAME = "rerank"  # of the application and of its ingress deployment


@serve.ingress()
class Rerank:
    """One replica: a Service and its HTTP application."""

    def __init__(self, settings: ServingSection):
        import torch

        torch.set_num_threads(settings.threads)
        self._settings = settings
        self._service = Service(
            Registry(settings.registry),
            settings.max_batch,
            settings.max_waiting,
            Figures(figures_folder()),
            device="cuda" if settings.gpus_per_replica else "cpu",
        )
        self._following: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Any:
        self._following = asyncio.get_event_loop().create_task(self._follow())
        return build_api(self._service, read_tokens(self._settings.token_file), self._settings.max_body)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._settings.poll_s)
            await asyncio.to_thread(self._service.live.refresh)


def build(arguments: dict[str, Any]) -> Application:
    """The application of the `[serving]` settings in `arguments`.

    Raises:
        UserError: an unknown setting, or a value out of range.
    """
    try:
        settings = ServingSection.model_validate(arguments)
    except ValidationError as error:
        raise UserError(f"serving: {first_mistake(error)}; mend the settings") from None
    scale: dict[str, Any] = {"num_replicas": settings.num_replicas}
    if settings.max_replicas > settings.num_replicas:
        scale = {
            "autoscaling_config": {
                "min_replicas": settings.num_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.max_batch,
            }
        }
    return serve.deployment(
        Rerank,
        name=NAME,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        # Beyond what the service itself lets wait: it then says 503 with Retry-After, and counts it.
        max_ongoing_requests=2 * settings.max_waiting,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=20,
        **scale,
    ).bind(settings)


def read_tokens(file: str) -> frozenset[str]:
    """Bearer tokens, one per line; none without a file.

    Raises:
        UserError: the file cannot be read, or holds none.
    """
    if not file:
        return frozenset()
    try:
        tokens = frozenset(line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"serving.token_file {file}: {error}") from None
    if not tokens - {""}:
        raise UserError(f"serving.token_file {file}: no token in it; write one per line")
    return tokens - {""}


def figures_folder() -> Path:
    """Of this user's replicas on this node, in this Ray cluster."""
    session = ray.get_runtime_context().get_session_name()
    return Path(tempfile.gettempdir()) / f"dpo4rec-figures-{os.getuid()}" / session
