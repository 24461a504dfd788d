"""Publish finished runs and serve reranks.

python jobs/serve.py run [RUN_FOLDER] [serving.key=value ...]     publish and promote it if that is new, and serve on this machine
python jobs/serve.py publish RUN_FOLDER [--as NAME] [--model NAME] [--promote]
python jobs/serve.py promote NAME | rollback | split NAME PERCENT | shadow NAME | status
python jobs/serve.py config [serving.key=value ...]               a config file for `serve deploy`

All take --registry FOLDER (default: runs/registry). A server follows its registry: within a second (serving.poll_s) it loads
what was promoted beside what answers now, checks it against recorded requests and swaps; what is broken is refused.
`run` serves until Ctrl-C or SIGTERM. On a cluster, start Ray with RAY_SERVE_ENABLE_HA_PROXY=1 on every node.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo4rec_ray.cli import session
from dpo4rec_ray.errors import UserError

if TYPE_CHECKING:
    from dpo4rec_ray.config.serving import ServingSection
    from dpo4rec_ray.serving.registry import Registry, Traffic
    from dpo4rec_ray.serving.version_files import VersionCard

HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
SERVE_ENV = {
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_worker_niceness": "0",  # a server waits for nobody; Ray's workers yield to all other processes by default
}
IMPORT_PATH = "dpo4rec_ray.serving.deployment:build"


def main(arguments: list[str] | None = None) -> int:
    """Parse and act; the user's mistakes become one line and exit code 2."""
    options = parse(arguments)
    return session.guarded(lambda: options.act(options), options.verbose)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jobs/serve.py", description="Publish finished runs and serve reranks."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--registry", default="", metavar="FOLDER", help="default: serving.registry, runs/registry"
    )
    common.add_argument("--verbose", action="store_true", help="show Ray's logs, and tracebacks")

    def action(name: str, act: Any, text: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, parents=[common], help=text, description=text)
        added.set_defaults(act=act)
        return added

    changes = {
        "nargs": "*",
        "default": [],
        "metavar": "serving.key=value",
        "help": "see ServingSection in config.py",
    }
    one = action("run", run, "publish and promote a run if that is new, and serve on this machine")
    one.add_argument(
        "run", nargs="?", default="", help="folder of a finished run; none: serve what is promoted"
    )
    one.add_argument("changes", **changes)
    one = action("publish", publish, "make a version of a finished run")
    one.add_argument("run", help="folder of a finished run")
    one.add_argument(
        "--as", dest="name", default="", metavar="NAME", help="of the version; default: run and time"
    )
    one.add_argument(
        "--model", default="", help="a folder of RUN/eval/rerankers; default: best on validation"
    )
    one.add_argument("--promote", action="store_true", help="and let it answer")
    action("promote", promote, "let a version answer").add_argument("name")
    action("rollback", rollback, "back to the version before; a split and a shadow end")
    one = action("split", split, "let a second version answer a share of the users; 0 ends it")
    one.add_argument("name")
    one.add_argument("percent", type=float)
    one = action("shadow", shadow, "ask a second version too, and measure how it differs")
    one.add_argument("name", nargs="?", default="", help="none: end it")
    action("status", status, "versions, and who answers")
    action("config", config_file, "print a config file for `serve deploy`").add_argument("changes", **changes)
    options, rest = parser.parse_known_args(arguments)
    # argparse gives up on positional arguments that stand behind an option
    if rest and (not hasattr(options, "changes") or any(one.startswith("-") for one in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.changes = [*options.changes, *rest]
    return options


def publish(options: argparse.Namespace) -> int:
    quiet(options)
    registry = registry_of(options)
    card = publish_run(registry, Path(options.run), options.name, options.model)
    print(f"published {card.version}: {card.model}, {card.num_users} users, {card.num_items} items")
    if options.promote:
        said(registry.promote(card.version))
    return 0


def promote(options: argparse.Namespace) -> int:
    quiet(options)
    return said(registry_of(options).promote(options.name))


def rollback(options: argparse.Namespace) -> int:
    return said(registry_of(options).rollback())


def split(options: argparse.Namespace) -> int:
    quiet(options)
    return said(registry_of(options).split(options.name, options.percent))


def shadow(options: argparse.Namespace) -> int:
    quiet(options)
    return said(registry_of(options).shadow(options.name))


def status(options: argparse.Namespace) -> int:
    registry = registry_of(options)
    for card in registry.cards():
        figures = ", ".join(f"{name} {value:.4f}" for name, value in card.figures.items())
        print(f"{card.version}  {card.created}  {card.model}  {card.num_users} users  test {figures}")
    return said(registry.traffic())


def config_file(options: argparse.Namespace) -> int:
    import yaml

    settings = serving_settings(options.changes, options.registry)
    shown = settings.model_dump(exclude_defaults=True)
    shown["registry"] = str(Path(settings.registry).resolve())
    for name in ("host", "port", "request_timeout_s"):
        shown.pop(name, None)
    content = {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": settings.host,
            "port": settings.port,
            "request_timeout_s": settings.request_timeout_s,
        },
        "applications": [{"name": "rerank", "route_prefix": "/", "import_path": IMPORT_PATH, "args": shown}],
    }
    print(f"# For `serve deploy FILE`; start Ray with {HAPROXY}=1 on every node.")
    if settings.host == "127.0.0.1":
        print(
            "# On several nodes make this with serving.host=0.0.0.0: HAProxy asks replicas of other nodes too."
        )
    print(yaml.safe_dump(content, sort_keys=False), end="")
    return 0


def run(options: argparse.Namespace) -> int:
    if "=" in options.run:  # no folder, only changes
        options.changes, options.run = [options.run, *options.changes], ""
    settings = serving_settings(options.changes, options.registry, options.run)
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"):
        raise UserError(
            "run serves on a Ray of its own; on a running cluster: jobs/serve.py config > serve.yaml, serve deploy serve.yaml"
        )
    need_port(settings)
    quiet(options)
    from dpo4rec_ray.serving import haproxy
    from dpo4rec_ray.serving.registry import Registry, check_version

    registry = Registry(settings.registry)
    if options.run:
        current = registry.traffic().current
        card = published_already(registry, Path(options.run))
        if card is None or not current:
            card = card or publish_run(registry, Path(options.run))
            said(registry.promote(card.version))
        elif card.version != current:  # somebody has rolled it back, or promoted another one
            print(f"{card.version} is this run's; {current} answers, as it did before")
    traffic = registry.traffic()
    if not traffic.current:
        raise UserError(
            f"{registry.root}: no version is promoted; name a run folder, or publish and promote one"
        )
    check_version(registry.folder(traffic.current))
    stop = threading.Event()
    folder = serve_environment(settings.request_timeout_s)
    try:
        start(settings, registry, options.verbose)
        for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own
            signal.signal(number, lambda *_: stop.set())
        address = f"http://{settings.host}:{settings.port}"
        if not settings.token_file:
            from dpo4rec_ray.serving.deployment import NO_TOKEN

            print(NO_TOKEN)
        print(f"{traffic.current} answers at {address}/v1/rerank; try it at {address}/, see {address}/docs")
        sys.stdout.flush()
        stop.wait()
    finally:
        import ray
        from ray import serve

        if ray.is_initialized():  # else serve.shutdown would start one
            serve.shutdown()
            ray.shutdown()
        haproxy.end(folder)
    print("stopped")
    return 0


def start(settings: ServingSection, registry: Registry, verbose: bool) -> None:
    """Ray, Serve's proxies and the replicas; returns when they answer.

    Raises:
        UserError: the machine has too few CPUs or GPUs; Serve would wait for them without a word.
    """
    import ray
    from ray import serve

    from dpo4rec_ray.serving.deployment import NAME, build

    application = build(settings.model_dump() | {"registry": str(registry.root)})  # refused before Ray starts
    session.start_ray(verbose)
    level = "INFO" if verbose else "WARNING"
    logging.getLogger("ray.serve").setLevel(level)
    there = ray.cluster_resources()
    for name, each in (("CPU", settings.cpus_per_replica), ("GPU", settings.gpus_per_replica)):
        need = each * settings.num_replicas
        writer = getattr(settings, f"writer_{name.lower()}s") if settings.online_llm == "async" else 0.0
        if need + writer > there.get(name, 0):
            more = f" and the writer {writer:g} (serving.writer_{name.lower()}s)" if writer else ""
            raise UserError(
                f"{settings.num_replicas} replicas need {need:g} {name}s{more}, the cluster has {there.get(name, 0):g}; "
                f"set serving.num_replicas or serving.{name.lower()}s_per_replica"
            )
    serve.start(proxy_location="EveryNode", http_options={"host": settings.host, "port": settings.port})
    try:
        serve.run(
            application,
            name=NAME,
            route_prefix="/",
            logging_config={"enable_access_log": False, "log_level": level},
        )
    except RuntimeError as error:
        found = serve.status().applications[NAME]
        said = [one.message for one in found.deployments.values() if one.message] or [
            found.message,
            str(error),
        ]
        lines = [line.strip() for line in said[0].splitlines() if line.strip()]
        raise UserError(f"the replicas do not start: {lines[-1] if lines else error}") from error


def serve_environment(timeout_s: float | None = None, tuned: bool = True) -> Path:
    """Set what Serve reads when it is imported, here and in the processes of a Ray that is started here; HAProxy's folder.

    The arguments are those of `haproxy.environment`.
    """
    from dpo4rec_ray.serving import haproxy

    folder = Path(tempfile.mkdtemp(prefix="dpo4rec-serve-"))
    defaults = session.WORK_ENV | haproxy.environment(folder, timeout_s, tuned) | SERVE_ENV
    os.environ.update({key: value for key, value in defaults.items() if key not in os.environ})
    return folder


def need_port(settings: ServingSection) -> None:
    """Raises UserError if the address cannot be listened at."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise UserError(
                f"cannot listen at {settings.host}:{settings.port}: {error.strerror}; set serving.port or serving.host"
            ) from None


def publish_run(registry: Registry, folder: Path, name: str = "", model: str = "") -> VersionCard:
    """Raises UserError if the run is not finished or the name is taken."""
    from dpo4rec_ray.config import read_config
    from dpo4rec_ray.serving.publish import publish as write
    from dpo4rec_ray.store.artifacts import RunDir

    config = read_config(folder)
    name = name or f"{folder.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return write(config, RunDir(folder), registry.folder(name), name, model)


def published_already(registry: Registry, folder: Path) -> VersionCard | None:
    """The newest version of the run's present evaluation."""
    from dpo4rec_ray.store.artifacts import RunDir

    source = RunDir(folder).require("per_list").fingerprint
    return next((card for card in reversed(registry.cards()) if card.source == source), None)


def serving_settings(changes: list[str], registry: str, run_folder: str = "") -> ServingSection:
    """The run's [serving], else the defaults, with `serving.key=value` over them.

    Raises:
        UserError: an unknown key, or a value out of range.
    """
    from dpo4rec_ray.config import default_config, read_config

    for change in changes:
        if not change.startswith("serving."):
            raise UserError(f"{change!r}: only serving.key=value can be set here")
    config = read_config(run_folder, changes) if run_folder else default_config(changes)
    return config.serving.model_copy(update={"registry": registry} if registry else {})


def registry_of(options: argparse.Namespace) -> Registry:
    from dpo4rec_ray.serving.registry import Registry

    return Registry(serving_settings([], options.registry).registry)


def said(traffic: Traffic) -> int:
    """Print who answers."""
    print(f"answers: {traffic.current or 'none'}", end="")
    if traffic.split:
        print(f"; {traffic.percent:g} % of the users: {traffic.split}", end="")
    if traffic.shadow:
        print(f"; asked too: {traffic.shadow}", end="")
    print(f"; before: {traffic.previous[-1]}" if traffic.previous else "")
    return 0


def quiet(options: argparse.Namespace) -> None:
    """Third-party logs go to a file beside the registry."""
    if not options.verbose:
        folder = registry_of(options).root
        folder.mkdir(parents=True, exist_ok=True)
        session.be_quiet(folder / "serve.log")
