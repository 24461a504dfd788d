"""The Ray Serve application. `dpo4rec serve run` runs `build`, and a config file for `serve deploy` names it."""

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
from dpo4rec_ray.config.serving import APPLICATION, ServingSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.fresh_texts import FreshTextLookup, FreshTextStore, TextJob
from dpo4rec_ray.serving.http import build_api
from dpo4rec_ray.serving.ray_metrics import RayExport
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.request_metrics import ServingMetrics, WriterMetrics
from dpo4rec_ray.serving.service import Service
from dpo4rec_ray.serving.tokens import read_tokens
from dpo4rec_ray.workers.placement import engine_env

logger = logging.getLogger("ray.serve")
MAX_FAILED = 20  # failed lists in a row after which a replica is replaced
NO_TOKEN = (
    "no token is needed (serving.token_file is not set): everyone who reaches the port may send requests"
)
WRITER_NAME = "writer"


@serve.ingress()
class Rerank:
    """One replica: a Service and its HTTP application."""

    def __init__(self, settings: ServingSection, writer: DeploymentHandle | None = None):
        """writer: the deployment that writes texts for unknown users, if there is one."""
        import torch

        torch.set_num_threads(settings.threads)
        self._settings = settings
        registry, self._writer, fresh_texts = Registry(settings.registry), None, None
        metrics = ServingMetrics(metrics_folder())
        self._exports = [RayExport(metrics.registry)]
        if writer is not None:
            of_jobs = WriterMetrics(metrics_folder())
            self._exports.append(RayExport(of_jobs.registry))
            self._writer = WriterClient(writer, of_jobs, settings.fresh_queue)
            store = FreshTextStore(registry.root, settings)
            fresh_texts = FreshTextLookup(store, self._writer.submit, settings.fresh_retry_s)
        self._service = Service(registry, settings, metrics, fresh_texts)
        self._tasks: list[asyncio.Task[None]] = []

    def __serve_build_asgi_app__(self) -> Any:
        loop = asyncio.get_event_loop()
        self._tasks.append(loop.create_task(self._follow()))
        if self._writer is not None:
            self._tasks.append(loop.create_task(self._writer.connect()))
        tokens = read_tokens(self._settings.token_file)
        if not tokens:
            logger.warning(NO_TOKEN)
        return build_api(self._service, tokens, self._settings.max_body)

    def check_health(self) -> None:
        """Raises RuntimeError if no list can be ranked any more, as after a GPU error. Serve then replaces the replica.

        Serve calls it every few seconds, so that it also hands the counts to Ray.
        """
        for export in self._exports:
            export.push()
        if self._service.failed_in_a_row >= MAX_FAILED:
            raise RuntimeError(f"the last {self._service.failed_in_a_row} lists could not be ranked")

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._settings.poll_s)
            try:
                await asyncio.to_thread(self._service.manager.refresh)
            except Exception:  # the folder may be away for a while; look again at the next turn
                logger.exception("the registry %s could not be read", self._settings.registry)


class WriterClient:
    """Sends the jobs of a replica to the writer, without waiting. To be called in the replica's event loop."""

    def __init__(self, writer: DeploymentHandle, metrics: WriterMetrics, max_sending: int):
        """max_sending: most jobs on their way. While the writer starts, all jobs are on their way."""
        self._writer, self._metrics, self._max_sending = writer, metrics, max_sending
        self._sending: set[asyncio.Task[None]] = set()

    async def connect(self) -> None:
        """Make the first call, which blocks the event loop for half a second, before a request needs it."""
        with contextlib.suppress(Exception):
            await self._writer.check_health.remote()

    def submit(self, job: TextJob) -> None:
        if len(self._sending) >= self._max_sending:
            self._metrics.refused("unreachable")
            return
        task = asyncio.get_running_loop().create_task(self._send(job))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send(self, job: TextJob) -> None:
        try:
            await self._writer.offer.remote(job)
        except Exception:  # the writer has died, or is being replaced
            self._metrics.refused("unreachable")


class WriterReplica:
    """The Serve deployment around a Writer."""

    def __init__(self, settings: ServingSection):
        from dpo4rec_ray.serving.writer import Writer

        registry = Registry(settings.registry)
        # Before the Writer: vLLM imports Prometheus' client, which reads the folder at that moment.
        metrics = WriterMetrics(metrics_folder())
        self._export = RayExport(metrics.registry)
        self._writer = Writer(registry, FreshTextStore(registry.root, settings), settings, metrics)

    async def offer(self, job: TextJob) -> bool:
        """As `Writer.offer`."""
        return self._writer.offer(job)

    def check_health(self) -> None:
        """Raises RuntimeError if no text can be written any more. Serve then starts another replica. Hands the counts to Ray."""
        self._export.push()
        if not self._writer.alive():
            raise RuntimeError("the writing thread has ended")


def writer_application(settings: ServingSection) -> Application:
    """The writer's deployment, for the ingress deployment to call.

    Raises:
        UserError: no version is promoted, or the current one has no LLM.
    """
    from dpo4rec_ray.serving.writer_setup import read_setup

    registry = Registry(settings.registry)
    version = registry.routing().current
    if not version:
        raise UserError(f"{registry.root}: no version is promoted; run `dpo4rec serve publish` and `promote`")
    setup = read_setup(registry, version, settings)
    return serve.deployment(
        WriterReplica,
        name=WRITER_NAME,
        num_replicas=1,
        ray_actor_options={
            "num_cpus": settings.writer_cpus,
            "num_gpus": settings.writer_gpus,
            "runtime_env": {"env_vars": engine_env(setup.config)},
        },
        health_check_period_s=5,
        graceful_shutdown_timeout_s=5,
    ).bind(settings)


def build(arguments: dict[str, Any]) -> Application:
    """The application. arguments: the keys of [serving].

    Raises:
        UserError: an unknown key, a value out of range, or a writer that the current version has no LLM for.
    """
    try:
        settings = ServingSection.model_validate(arguments)
    except ValidationError as error:
        raise UserError(f"serving: {first_mistake(error)}; correct the settings") from None
    writer = [writer_application(settings)] if settings.online_llm == "async" else []
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
        name=APPLICATION,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        # More than the service lets wait, so that the service itself refuses: with 503, Retry-After and a count.
        max_ongoing_requests=2 * settings.max_waiting,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=20,
        **scale,
    ).bind(settings, *writer)


def metrics_folder() -> Path:
    """Where the replicas of this user, on this node and of this Ray cluster, count.

    Raises:
        UserError: another user owns the folder, or may use it.
    """
    parent = Path(tempfile.gettempdir()) / f"dpo4rec-metrics-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    found = parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(f"{parent}: other users own or may use this folder; remove it, or set TMPDIR")
    return parent / ray.get_runtime_context().get_session_name()
