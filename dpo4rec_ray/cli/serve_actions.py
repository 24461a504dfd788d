"""What each action of `dpo4rec serve` does (cli/serve.py)."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import signal
import socket
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from dpo4rec_ray.cli import session
from dpo4rec_ray.config.serving import APPLICATION, ServingSection
from dpo4rec_ray.errors import UserError, first_line
from dpo4rec_ray.serving.tokens import read_tokens
from dpo4rec_ray.storage.places import Place, place
from dpo4rec_ray.workers.placement import joined_cluster

if TYPE_CHECKING:
    from dpo4rec_ray.serving.registry import Registry, Routing
    from dpo4rec_ray.serving.version_files import VersionCard

SERVE_ENV = {
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_worker_niceness": "0",  # Ray's workers yield to all other processes by default; a server should not
}
LOG = "serve.log"  # in the registry: what libraries and Ray say
WAKE_S = 0.2  # between two looks for a signal
IMPORT_PATH = "dpo4rec_ray.serving.deployment:build"


def publish(options: argparse.Namespace) -> int:
    registry = open_registry(options)
    card = publish_run(registry, place(options.run), options.name, options.model)
    print(f"published {card.version}: {card.model}, {card.num_users} users, {card.num_items} items")
    if options.promote:
        show(registry.promote(card.version))
    return 0


def change(options: argparse.Namespace) -> int:
    """promote, rollback, split and shadow: the registry's method of that name, with the arguments of the action."""
    arguments = [getattr(options, name) for name in ("name", "percent") if hasattr(options, name)]
    need_registry(options)
    return show(getattr(open_registry(options), options.action)(*arguments))


def status(options: argparse.Namespace) -> int:
    registry = need_registry(options)
    for card in registry.cards():
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in card.metrics.items())
        print(f"{card.version}  {card.created}  {card.model}  {card.num_users} users  test {metrics}")
    return show(registry.routing())


def config(options: argparse.Namespace) -> int:
    import yaml

    from dpo4rec_ray.serving.haproxy import ON_CLUSTERS

    settings = serving_settings(options.changes, options.registry)
    http = settings.model_dump(include={"host", "port", "request_timeout_s"})
    arguments = settings.model_dump(exclude_defaults=True, exclude=set(http)) | {
        "registry": settings.registry
    }
    for name in arguments.keys() & {"registry", "token_file"}:  # replicas start in folders of their own
        arguments[name] = str(place(arguments[name]))
    application = {"name": APPLICATION, "route_prefix": "/", "import_path": IMPORT_PATH, "args": arguments}
    content = {"proxy_location": "EveryNode", "http_options": http, "applications": [application]}
    print("# For `serve deploy FILE`. On every node, before `ray start`:")
    for name, value in ON_CLUSTERS.items():
        print(f"#   export {name}={shlex.quote(value)}")
    if settings.host == "127.0.0.1":
        print(
            "# For several nodes, make this file with serving.host=0.0.0.0: HAProxy also asks replicas of other nodes."
        )
    print(yaml.safe_dump(content, sort_keys=False), end="")
    return 0


def run(options: argparse.Namespace) -> int:
    if "=" in options.run:  # no folder, only changes
        options.changes, options.run = [options.run, *options.changes], ""
    if options.run:
        session.check_came_to("per_list", 0, options.run)
    settings = serving_settings(options.changes, options.registry, options.run)
    if joined_cluster():
        raise UserError(
            "run serves on a Ray of its own; on a running cluster: dpo4rec serve config > serve.yaml, serve deploy serve.yaml"
        )
    need_port(settings)
    if not Path(settings.token_file).is_fifo():  # a pipe can be read once, by the replica
        read_tokens(settings.token_file)
    registry = open_registry(options, settings.registry)
    from dpo4rec_ray.serving.version_check import load_version

    if options.run:
        current = registry.routing().current
        card = published_already(registry, place(options.run))
        if card is None or not current:
            card = card or publish_run(registry, place(options.run))
            show(registry.promote(card.version))
        elif card.version != current:  # after a rollback, or another promotion
            where = f" --registry {options.registry}" if options.registry else ""
            print(
                f"this run is version {card.version}, but version {current} stays the current one; to change that: "
                f"dpo4rec serve promote {card.version}{where}"
            )
    routing = registry.routing()
    if not routing.current:
        raise UserError(
            f"{registry.root}: no version is promoted; name a run folder, or publish and promote one"
        )
    load_version(registry.folder(routing.current))
    serve_until_stopped(settings, registry, routing.current, options.verbose)
    print("stopped")
    return 0


def serve_until_stopped(settings: ServingSection, registry: Registry, version: str, verbose: bool) -> None:
    """Start the server and return after Ctrl-C or SIGTERM, when all its processes have ended. Raises as `start`."""
    from dpo4rec_ray.serving import haproxy

    signals: list[int] = []
    terminal = sys.stdout
    folder = serve_environment(settings.request_timeout_s)
    # Ray prints what befalls its processes on standard output, and always one such line at the end: Serve's controller
    # kills itself before it has answered the call that ends it.
    with session.log_file(registry.root, LOG).open("a") as log, redirect_stdout(terminal if verbose else log):
        try:
            start(settings, registry, verbose)
            for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own
                signal.signal(number, lambda number, _: signals.append(number))
            address = f"http://{settings.host}:{settings.port}"
            if not settings.token_file:
                from dpo4rec_ray.serving.deployment import NO_TOKEN

                print(NO_TOKEN, file=terminal)
            where = f"at {address}/v1/rerank; try it at {address}/, see {address}/docs"
            print(f"{version} answers {where}", file=terminal, flush=True)
            # No lock: a signal that reaches one of Ray's threads does not wake this one, whose turn it is to handle it.
            while not signals:
                time.sleep(WAKE_S)
        finally:
            import ray
            from ray import serve

            try:
                if ray.is_initialized():  # else serve.shutdown would start one
                    serve.shutdown()
                    ray.shutdown()
            finally:  # also when another signal interrupts this
                haproxy.end(folder)


def start(settings: ServingSection, registry: Registry, verbose: bool) -> None:
    """Start Ray, Serve's proxies and the replicas. Returns when they answer.

    Raises:
        UserError: the machine has too few CPUs or GPUs (Serve would wait for them without a message), or the replicas fail.
    """
    import ray
    from ray import serve

    from dpo4rec_ray.serving.deployment import build

    application = build(settings.model_dump() | {"registry": str(registry.root)})  # refused before Ray starts
    session.start_ray(verbose)
    # Until the server answers, SIGTERM is Ctrl-C. Ray's own handler aborts the process, with a dump of the stack.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    level = "INFO" if verbose else "WARNING"
    logging.getLogger("ray.serve").setLevel(level)
    there, writers = ray.cluster_resources(), int(settings.online_llm == "async")
    for kind in ("cpu", "gpu"):
        replica, writer = getattr(settings, f"{kind}s_per_replica"), getattr(settings, f"writer_{kind}s")
        need, has = replica * settings.num_replicas + writer * writers, there.get(kind.upper(), 0)
        if need > has:
            raise UserError(
                f"{settings.num_replicas} replicas and {writers} writers need {need:g} {kind.upper()}s, the cluster has "
                f"{has:g}; set serving.num_replicas, serving.{kind}s_per_replica or serving.writer_{kind}s"
            )
    serve.start(proxy_location="EveryNode", http_options={"host": settings.host, "port": settings.port})
    logs = {"enable_access_log": False, "log_level": level}
    try:
        serve.run(application, name=APPLICATION, route_prefix="/", logging_config=logs)
    except RuntimeError as error:
        found = serve.status().applications[APPLICATION]
        messages = [one.message for one in found.deployments.values() if one.message]
        lines = [line.strip() for line in (messages or [found.message])[0].splitlines() if line.strip()]
        reason = lines[-1].removeprefix(f"{UserError.__module__}.UserError: ") if lines else error
        raise UserError(f"the replicas do not start: {reason}") from error


def serve_environment(timeout_s: float | None = None, tuned: bool = True) -> Path:
    """Set the variables that Serve reads when it is imported, here and in the processes of a Ray that is started here.

    The arguments are those of `haproxy.environment`. Returns HAProxy's folder.
    """
    from dpo4rec_ray.serving import haproxy

    folder = Path(tempfile.mkdtemp(prefix="dpo4rec-serve-"))
    session.set_defaults(session.WORK_ENV | haproxy.environment(folder, timeout_s, tuned) | SERVE_ENV)
    return folder


def need_port(settings: ServingSection) -> None:
    """Raises UserError if the server cannot listen at its address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise UserError(
                f"cannot listen at {settings.host}:{settings.port}: {error.strerror}; set serving.port or serving.host"
            ) from None


def publish_run(registry: Registry, folder: Place, name: str = "", model: str = "") -> VersionCard:
    """Raises UserError if the run is not finished or the name is taken."""
    from dpo4rec_ray.config import read_config
    from dpo4rec_ray.serving.publish import publish as write
    from dpo4rec_ray.store.artifacts import RunDir

    session.check_came_to("per_list", 0, folder)
    settings = read_config(folder)
    name = name or f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return write(settings, RunDir(folder), registry.folder(name), name, model)


def published_already(registry: Registry, folder: Place) -> VersionCard | None:
    """The newest version of the run's present evaluation."""
    from dpo4rec_ray.store.artifacts import RunDir

    source = RunDir(folder).require("per_list").fingerprint
    return next((card for card in reversed(registry.cards()) if card.source == source), None)


def serving_settings(changes: list[str], registry: str, run_folder: str = "") -> ServingSection:
    """The [serving] section of the run, or the defaults, changed by `serving.key=value`.

    Raises:
        UserError: an unknown key, or a value out of range.
    """
    from dpo4rec_ray.config import default_config, read_config

    for change in changes:
        if not change.startswith("serving."):
            raise UserError(f"{change!r}: only serving.key=value can be set here")
    if registry:
        changes = [*changes, f"serving.registry={json.dumps(registry, ensure_ascii=False)}"]
    return (read_config(run_folder, changes) if run_folder else default_config(changes)).serving


def open_registry(options: argparse.Namespace, folder: str = "") -> Registry:
    """The registry in `folder`, or in that of the options, made where it is missing; the logs of libraries go to a file there
    (not if --verbose).

    Raises:
        UserError: the folder cannot be made or written.
    """
    from dpo4rec_ray.serving.registry import Registry

    registry = Registry(folder or serving_settings([], options.registry).registry)
    try:
        registry.root.mkdir(parents=True, exist_ok=True)
        if not options.verbose:
            session.be_quiet(session.log_file(registry.root, LOG))
    except OSError as error:
        raise UserError(
            f"{registry.root}: no registry can be written here: {error.strerror or first_line(error)}; name a folder of "
            "yours with --registry (serving.registry)"
        ) from None
    return registry


def need_registry(options: argparse.Namespace) -> Registry:
    """The registry of the options. Nothing is written. Raises UserError if there is none."""
    from dpo4rec_ray.serving.registry import Registry

    registry = Registry(serving_settings([], options.registry).registry)
    if not registry.exists():
        raise UserError(
            f"{registry.root}: no registry; make one (dpo4rec serve publish RUN_FOLDER --promote), or name another folder "
            "with --registry"
        )
    return registry


def show(routing: Routing) -> int:
    """Print which versions answer. Returns the exit code."""
    print(f"answers: {routing.current or 'none'}", end="")
    if routing.split:
        print(f"; {routing.percent:g} % of the users: {routing.split}", end="")
    if routing.shadow:
        print(f"; asked too: {routing.shadow}", end="")
    print(f"; before: {routing.previous[-1]}" if routing.previous else "")
    return 0
