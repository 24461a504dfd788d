"""What every command shares: exit codes, quiet logs, one job per run folder, and the start of Ray."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dpo4rec_ray.cli.mistakes import user_mistake
from dpo4rec_ray.errors import UserError, first_line
from dpo4rec_ray.storage.lease import GONE_AFTER_S, Held, lease
from dpo4rec_ray.storage.local_copies import cache_root
from dpo4rec_ray.storage.places import Place, is_remote, place, remove, write_bytes, write_text

if TYPE_CHECKING:
    from dpo4rec_ray.config import Config

WORK_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": "15",  # otherwise Ray starts for ever what does not fit into memory
    "TOKENIZERS_PARALLELISM": "false",
}
# One try to reach a cluster's head takes half a minute; a wrong token would be tried twenty times.
JOIN_ENV = {"RAY_gcs_server_port_wait_time_s": "1"}
STOPPED = 128 + signal.SIGTERM
DRIVER_LOG = "driver.log"
PROBE = ".probe"
QUIET_ENV = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
}


def set_defaults(env: Mapping[str, str]) -> None:
    """Set those of the variables that the environment does not have."""
    for name, value in env.items():
        os.environ.setdefault(name, value)


def guarded(call: Callable[[], int], verbose: bool) -> int:
    """The exit code of `call`; a user's mistake becomes one line and code 2."""
    try:
        return call()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == STOPPED:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return STOPPED
        cause = user_mistake(error)
        if cause is None or verbose:
            raise
        print(f"error: {cause}", file=sys.stderr)
        return 2


def open_run(config: Config, verbose: bool) -> Place:
    """The run's folder, made where it is missing, and this process set up for its work.

    To be called before torch, Ray or an engine is imported: they read the environment once.
    """
    folder = place(config.run.root) / config.run.name
    from dpo4rec_ray.cli.cluster import check_lasting

    check_lasting(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_remote(folder):  # where making a folder does nothing
            write_text(folder / PROBE, "")
            remove(folder / PROBE)
    except Exception as error:  # each store has errors of its own
        raise UserError(
            f"the run folder {folder} cannot be made ({getattr(error, 'strerror', None) or first_line(error)[:200]}); set "
            "run.root to a folder that can be written to"
        ) from None
    set_up(log_file(folder), verbose)
    return folder


def log_file(folder: Place, name: str = DRIVER_LOG) -> Path:
    """Where libraries write while the job runs: an object store knows no append, and gets the file at the end."""
    if not is_remote(folder):
        return folder / name
    logs = cache_root() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return logs / f"{folder.name}-{os.getpid()}-{name}"


def set_up(log: Path, verbose: bool) -> None:
    """The environment of this process; what libraries say goes to `log`, unless verbose. As early as `open_run`."""
    set_defaults(WORK_ENV)
    if not verbose:
        be_quiet(log)


def check_came_to(artifact: str, round_id: int, folder: str | Place) -> None:
    """That a run folder has its settings and an artifact of the run's end, where it is a run folder at all: for "per_list" the
    summary too, which is not there while a stage before is made anew, so that nobody sets new settings beside old figures.

    Raises:
        UserError: the run is not finished; says which stages are complete.
    """
    from dpo4rec_ray.store.artifacts import RunDir

    store = RunDir(folder)
    ended = artifact != "per_list" or (store.root / "summary.json").is_file()
    if ended and (store.root / "config.json").is_file() and store.manifest(artifact, round_id):
        return
    if not store.root.is_dir():
        return
    from dpo4rec_ray.pipeline import how_far

    done, missing = how_far(store)
    if done:
        what = f"{', '.join(done)} done, {', '.join(missing) or 'report'} not"
        raise UserError(
            f"{folder}: an unfinished run: {what}; run its recipe without --only "
            "or --from first (dpo4rec run RECIPE ...); what is done is kept"
        )


@contextlib.contextmanager
def ray_job(folder: Place, verbose: bool) -> Iterator[None]:
    """The only job in a run folder, on a Ray that runs, with its memory watched."""
    from dpo4rec_ray.store.memory import watch_memory

    with locked(folder):
        watch_memory()
        join(folder, verbose)
        try:
            yield
        finally:
            keep_log(folder)


def keep_log(folder: Place) -> None:
    """Put what libraries wrote beside the run, where it is not there already."""
    log = log_file(folder)
    if is_remote(folder) and log.is_file():
        with contextlib.suppress(Exception):  # the run itself is done
            write_bytes(folder / DRIVER_LOG, log.read_bytes())


@contextlib.contextmanager
def locked(folder: Place) -> Iterator[None]:
    """One job at a time per run folder, on whatever machine; a job whose process or machine is gone holds it no longer."""

    def lost() -> None:
        print(
            f"error: another job has taken over {folder}: this one was cut off from it for too long; it ends here",
            file=sys.stderr,
            flush=True,
        )
        os.kill(os.getpid(), signal.SIGTERM)

    def waiting(holder: str) -> None:
        print(
            f"{holder} held {folder}; waiting up to {GONE_AFTER_S:.0f} s for a sign of life", file=sys.stderr
        )

    try:
        with lease(folder, lost=lost, waiting=waiting):
            yield
    except Held as error:
        raise UserError(
            f"another job ({error}) is at work in {folder}; wait for it, or set run.name to another one"
        ) from None


class _Terminal(io.TextIOWrapper):
    """Standard error as it was before native code's output went to the log."""


def be_quiet(log: Path) -> None:
    """Turn down third-party logs; before their libraries are imported, as most read this once.

    What native code still writes to standard error goes to `log`; Python's own sys.stderr stays the terminal.
    """
    if isinstance(sys.stderr, _Terminal):
        return
    set_defaults(QUIET_ENV)
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.ERROR)
    with open(log, "ab") as target:
        terminal = os.dup(2)
        os.dup2(target.fileno(), 2)
    sys.stderr = _Terminal(os.fdopen(terminal, "wb", buffering=0), write_through=True)


def join(folder: Place, verbose: bool) -> None:
    """`start_ray`; on a cluster, the nodes and what they see of `folder` are checked first, which takes seconds.

    Raises:
        UserError: Ray cannot be started or joined, nodes differ, or they do not share the folder.
    """
    import ray

    if not ray.is_initialized():
        start_ray(verbose)
        from dpo4rec_ray.cli.cluster import check_joined

        check_joined(folder)


def start_ray(verbose: bool) -> None:
    """Join the cluster this job was submitted to, or start Ray on this machine alone. SIGTERM then ends the command (STOPPED)."""
    import ray

    from dpo4rec_ray.workers.placement import joined_cluster

    if ray.is_initialized():
        return
    own = {"address": "local", "include_dashboard": False, "object_store_memory": 512 * 2**20}
    level = logging.INFO if verbose else logging.ERROR
    joined = joined_cluster()
    if joined:
        _check_address(os.environ.get("RAY_ADDRESS", ""))
        set_defaults(JOIN_ENV)
    elif "RAY_AUTH_MODE" not in os.environ:
        own_token()
    try:
        ray.init(log_to_driver=verbose, logging_level=level, **({} if joined else own))
    except Exception as error:  # no work of ours has begun
        reason = user_mistake(error) or f"Ray could not be started or joined: {first_line(error)}"
        raise UserError(f"{reason} (--verbose shows more)") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)  # Ray's own handler ends the process without a word
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not verbose:
        for name in ("ray", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def own_token() -> None:
    """A token for the Ray that this process starts, known to it alone.

    Without one, Ray 2.60 makes ~/.ray/auth_token, and a later `ray start` on this machine asks for tokens that its workers and
    jobs do not have.
    """
    from ray._raylet import Config as RayConfig

    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
    RayConfig.initialize("")  # Ray has read the mode when it was imported


def _stop(*_: object) -> NoReturn:
    raise SystemExit(STOPPED)


def _check_address(address: str) -> None:
    """Ray itself waits for minutes for a cluster that is gone, and then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # also "auto" and "local"
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS = {address!r}: no Ray answers there ({error}); correct it, start the cluster (ray start --head), or "
            "unset RAY_ADDRESS to run on this machine alone"
        ) from None
