"""The Ray Serve application: `build` is what jobs/serve.py runs and what a config file for `serve deploy` names."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from dpo4rec_ray.config.section import first_mistake
from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.figures import Figures, FreshFigures
from dpo4rec_ray.serving.fresh import FreshStore, FreshTexts, Order
from dpo4rec_ray.serving.http import build_api
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.service import Service
from dpo4rec_ray.workers.placement import engine_env

logger = logging.getLogger("ray.serve")
MAX_FAILED = 20  # lists in a row, after which a replica is replaced
NO_TOKEN = "no token is asked for (serving.token_file): whoever reaches the port may ask"
NAME = "rerank"  # of the application and of its ingress deployment
WRITER_NAME = "writer"


@serve.ingress()
class Rerank:
    """One replica: a Service and its HTTP application."""

    def __init__(self, settings: ServingSection, writer: DeploymentHandle | None = None):
        """writer: the deployment that writes texts for users whom no version knows, where there is one."""
        import torch

        torch.set_num_threads(settings.threads)
        self._settings = settings
        registry, self._sender, fresh = Registry(settings.registry), None, None
        if writer is not None:
            self._sender = Sender(writer, FreshFigures(figures_folder()), settings.fresh_queue)
            store = FreshStore(registry.root, settings.fresh_ttl_s)
            fresh = FreshTexts(store, self._sender, settings.fresh_retry_s)
        self._service = Service(
            registry,
            settings.max_batch,
            settings.max_waiting,
            Figures(figures_folder()),
            fresh,
            device="cuda" if settings.gpus_per_replica else "cpu",
        )
        self._tasks: list[asyncio.Task[None]] = []

    def __serve_build_asgi_app__(self) -> Any:
        loop = asyncio.get_event_loop()
        self._tasks.append(loop.create_task(self._follow()))
        if self._sender is not None:
            self._tasks.append(loop.create_task(self._sender.open()))
        tokens = read_tokens(self._settings.token_file)
        if not tokens:
            logger.warning(NO_TOKEN)
        return build_api(self._service, tokens, self._settings.max_body)

    def check_health(self) -> None:
        """Raises RuntimeError when nothing is ranked any more, as after an error of the GPU; Serve then replaces the replica."""
        if self._service.failed_in_a_row >= MAX_FAILED:
            raise RuntimeError(f"the last {self._service.failed_in_a_row} lists could not be ranked")

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._settings.poll_s)
            try:
                await asyncio.to_thread(self._service.live.refresh)
            except Exception:  # a folder that is away for a while must not end the following
                logger.exception("the registry %s could not be read", self._settings.registry)


class Sender:
    """Hands a replica's orders to the writer and waits for nothing; to be called in the replica's event loop."""

    def __init__(self, writer: DeploymentHandle, figures: FreshFigures, max_sending: int):
        """max_sending: orders that may be on their way, which is where they stay while the writer starts."""
        self._writer, self._figures, self._max_sending = writer, figures, max_sending
        self._sending: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Find the way to the writer, which holds up the loop for half a second, before a request needs it."""
        with contextlib.suppress(Exception):
            await self._writer.check_health.remote()

    def __call__(self, order: Order) -> None:
        if len(self._sending) >= self._max_sending:
            self._figures.refused("unreachable")
            return
        task = asyncio.get_running_loop().create_task(self._send(order))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send(self, order: Order) -> None:
        try:
            await self._writer.offer.remote(order)
        except Exception:  # it has died, or is being replaced
            self._figures.refused("unreachable")


class WriterReplica:
    """The Serve deployment around a Writer."""

    def __init__(self, settings: ServingSection):
        from dpo4rec_ray.serving.writer import Writer

        registry = Registry(settings.registry)
        store = FreshStore(registry.root, settings.fresh_ttl_s, settings.fresh_max_users)
        # First of all: vLLM imports Prometheus' client, which has to know the folder by then.
        figures = FreshFigures(figures_folder())
        self._writer = Writer(registry, store, settings, figures)

    async def offer(self, order: Order) -> bool:
        """As `Writer.offer`."""
        return self._writer.offer(order)

    def check_health(self) -> None:
        """Raises RuntimeError when no text will ever be written again; Serve then starts another replica."""
        if not self._writer.alive():
            raise RuntimeError("the writing thread has ended")


def writer_application(settings: ServingSection) -> Application:
    """The writer's deployment, to be bound to the ingress.

    Raises:
        UserError: no version is promoted, or the current one has no LLM.
    """
    from dpo4rec_ray.serving.writer import plan_of

    registry = Registry(settings.registry)
    version = registry.traffic().current
    if not version:
        raise UserError(f"{registry.root}: no version is promoted; run jobs/serve.py publish and promote")
    plan = plan_of(registry, version, settings)
    return serve.deployment(
        WriterReplica,
        name=WRITER_NAME,
        num_replicas=1,
        ray_actor_options={
            "num_cpus": settings.writer_cpus,
            "num_gpus": settings.writer_gpus,
            "runtime_env": {"env_vars": engine_env(plan.config)},
        },
        health_check_period_s=5,
        graceful_shutdown_timeout_s=5,
    ).bind(settings)


def build(arguments: dict[str, Any]) -> Application:
    """The application of the `[serving]` settings in `arguments`.

    Raises:
        UserError: an unknown setting, a value out of range, or a writer that the current version has no LLM for.
    """
    try:
        settings = ServingSection.model_validate(arguments)
    except ValidationError as error:
        raise UserError(f"serving: {first_mistake(error)}; mend the settings") from None
    writer: list[Application] = []
    if settings.online_llm == "async":
        writer = [writer_application(settings)]
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
    ).bind(settings, *writer)


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
    if not all(token.isascii() for token in tokens):
        raise UserError(
            f"serving.token_file {file}: a token with characters outside ASCII, which headers cannot carry"
        )
    return tokens - {""}


def figures_folder() -> Path:
    """Of this user's replicas on this node, in this Ray cluster.

    Raises:
        UserError: somebody else has made the folder, or may write to it.
    """
    parent = Path(tempfile.gettempdir()) / f"dpo4rec-figures-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    found = parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(f"{parent}: not a folder of this user alone; remove it, or set TMPDIR")
    return parent / ray.get_runtime_context().get_session_name()
