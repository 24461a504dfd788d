"""Run a recipe.

python jobs/run.py RECIPE.toml [FRAGMENT.toml ...] [section.key=value ...] [--only STAGE] [--from STAGE] [--round R]

Reads the recipe, starts or joins Ray, and runs the stages of dpo4rec_ray/pipeline.py. Ends with code 0, or with code 2
and one line when the recipe, the input or the machine is at fault.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from dpo4rec_ray.errors import UserError

WORK_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
QUIET_ENV = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, and turn the user's mistakes into one line and exit code 2."""
    options = parse(arguments)
    return guarded(lambda: run(options), options.verbose)


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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jobs/run.py", description="Run a DPO4Rec recipe; finished stages are skipped."
    )
    parser.add_argument("recipe", help="a TOML file, see jobs/recipes/")
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="FRAGMENT.toml | section.key=value",
        help="values that replace the recipe's: first those of TOML files, such as a search's found.toml, in order, "
        "then single ones",
    )
    parser.add_argument(
        "--only", default="", metavar="STAGE", help="run this stage alone, even if it is complete"
    )
    parser.add_argument("--from", dest="since", default="", metavar="STAGE", help="run from this stage on")
    parser.add_argument(
        "--round", type=int, default=None, metavar="R", help="with --only or --from: in this round"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="show the logs of Ray, vLLM and DeepSpeed, and tracebacks"
    )
    return parser.parse_intermixed_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Check what costs nothing first; torch, Ray and the engines are imported after the recipe is known to be sound."""
    from dpo4rec_ray.config import load_config

    config = load_config(options.recipe, options.changes)
    folder = Path(config.run.root) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update({key: value for key, value in WORK_ENV.items() if key not in os.environ})
    if not options.verbose:
        be_quiet(folder / "driver.log")
    from dpo4rec_ray import checks, memory
    from dpo4rec_ray.artifacts import RunDir
    from dpo4rec_ray.pipeline import STAGE_NAMES, Selection, check_selection, run_pipeline

    for flag, stage in (("--only", options.only), ("--from", options.since)):
        if stage and stage not in STAGE_NAMES:
            raise UserError(f"{flag} {stage}: no such stage; known: {', '.join(STAGE_NAMES)}")
    if options.only and options.since:
        raise UserError("--only and --from exclude each other")
    if options.round is not None and not (options.only or options.since):
        raise UserError("--round needs --only or --from")
    selection = Selection(options.only, options.since, options.round)
    check_selection(config, selection)
    checks.check_all(config, options.only)
    with locked(folder):
        memory.watch_memory()
        start_ray(options.verbose)
        run_pipeline(config, RunDir(folder), selection)
    return 0


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
    os.environ.update({key: value for key, value in QUIET_ENV.items() if key not in os.environ})
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.ERROR)
    with open(log, "ab") as target:
        terminal = os.dup(2)
        os.dup2(target.fileno(), 2)
    sys.stderr = _Terminal(os.fdopen(terminal, "wb", buffering=0), write_through=True)


def start_ray(verbose: bool) -> None:
    """Join the cluster this job was submitted to, or start Ray on this machine alone."""
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"):
        ray.init(log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.ERROR)
    else:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            object_store_memory=512 * 2**20,
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not verbose:
        for name in ("ray", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def user_mistake(error: BaseException) -> str | None:
    """The user's mistake inside an exception from the driver or a worker, or None when it is ours."""
    for inner in chain(error):
        if type(inner) is UserError:  # Ray's wrappers of one are instances too; their text is the traceback
            return str(inner).split("\n", 1)[0]  # Ray Data adds advice of its own below
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


if __name__ == "__main__":
    sys.exit(main())
