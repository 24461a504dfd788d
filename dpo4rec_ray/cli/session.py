"""What every command shares: exit codes, quiet logs, one job per run folder, and the start of Ray."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dpo4rec_ray.errors import UserError, first_line

if TYPE_CHECKING:
    from dpo4rec_ray.config import Config

WORK_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
QUIET_ENV = {"RAY_DATA_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


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
        cause = user_mistake(error)
        if cause is None or verbose:
            raise
        print(f"error: {cause}", file=sys.stderr)
        return 2


def open_run(config: Config, verbose: bool) -> Path:
    """The run's folder, made where it is missing, and this process set up for its work.

    To be called before torch, Ray or an engine is imported: they read the environment once.
    """
    folder = Path(config.run.root) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    set_up(folder / "driver.log", verbose)
    return folder


def set_up(log: Path, verbose: bool) -> None:
    """The environment of this process; what libraries say goes to `log`, unless verbose. As early as `open_run`."""
    set_defaults(WORK_ENV)
    if not verbose:
        be_quiet(log)


@contextlib.contextmanager
def ray_job(folder: Path, verbose: bool) -> Iterator[None]:
    """The only job in a run folder, on a Ray that runs, with its memory watched."""
    from dpo4rec_ray.store.memory import watch_memory

    with locked(folder):
        watch_memory()
        start_ray(verbose)
        yield


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One job at a time per run folder; the lock goes with the process, however that ends."""
    with open(folder / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another job is at work in {folder}; wait for it, or set run.name to another one"
            ) from None
        yield


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


def start_ray(verbose: bool) -> None:
    """Join the cluster this job was submitted to, or start Ray on this machine alone."""
    import ray

    from dpo4rec_ray.workers.placement import joined_cluster

    if ray.is_initialized():
        return
    own = {"address": "local", "include_dashboard": False, "object_store_memory": 512 * 2**20}
    level = logging.INFO if verbose else logging.ERROR
    ray.init(log_to_driver=verbose, logging_level=level, **({} if joined_cluster() else own))
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not verbose:
        for name in ("ray", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def user_mistake(error: BaseException) -> str | None:
    """The user's mistake inside an exception from the driver or a worker, or None when it is ours."""
    for inner in chain(error):
        if type(inner) is UserError:  # Ray's wrappers of one are instances too; their text is the traceback
            return first_line(inner)  # Ray Data adds advice of its own below
        if _disk_is_full(inner):
            return "no space left on the disk of the run folder; free some or change run.root, then run again"
        if isinstance(inner, PermissionError):
            return f"{inner.filename}: not allowed to write here; set run.root to a folder of yours"
    return None


def _disk_is_full(error: BaseException) -> bool:
    """By number, or by text: errors from workers and from safetensors reach us without the number."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("[Errno 28]", "os error 28", "No space left on device"))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what caused it, through Ray's own wrappers."""
    seen: set[int] = set()
    todo = [error]
    while todo:
        inner = todo.pop(0)
        if inner is None or id(inner) in seen:
            continue
        seen.add(id(inner))
        yield inner
        failures = getattr(inner, "worker_failures", None)
        todo += list(failures.values()) if isinstance(failures, dict) else []
        todo += [getattr(inner, name, None) for name in ("cause", "_base_exc", "__cause__", "__context__")]
        todo = [item for item in todo if item is None or isinstance(item, BaseException)]
