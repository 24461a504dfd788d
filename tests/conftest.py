"""Shared fixtures. Real engines throughout; a run is made once per session and looked at by many tests."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock
from hypothesis import settings

# The gate draws the same examples every time; `make fuzz` draws new ones.
# No deadline: how long an example takes must not decide a test.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.register_profile("fuzz", print_blob=True, deadline=None)
settings.load_profile("fixed")

pytest_plugins = [
    "tests.serving_world",
    "tests.object_store",
    "tests.browser",
    "tests.tracker_records",
]  # fixtures of the tests that serve; an S3 server; a browser; trackers without an account

# Tiny tensors on two cores: a second thread only waits, and with other work on the machine a test takes ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "HF_HUB_DISABLE_TELEMETRY", "1"
)  # TRL's trainer, the peer, would report each of its runs

# A shell starts background jobs with Ctrl-C ignored, and what the tests start would inherit that; a handler becomes the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if sys.version_info < (3, 11, 8):
    # There two threads that parse at once can end in a SystemError (gh-106905), and here a server's thread does so when it
    # imports what pytest rewrites.
    parse, parsing = ast.parse, threading.RLock()

    def parse_alone(*arguments: Any, **named: Any) -> ast.AST:
        with parsing:
            return parse(*arguments, **named)

    ast.parse = parse_alone

ROOT = Path(__file__).resolve().parents[1]
DEMO = "jobs/recipes/demo.toml"
# The demo, small enough for a test: every stage, every engine, one epoch of everything.
TINY = [
    "sample.num_users=60",
    "generate.num_samples=3",
    "generate.num_engines=1",  # a second one would start in every small run
    "generate.users_per_shard=8",
    "reranker.epochs=2",
    "reward.num_redraws=2",
    "reward.must_read=false",  # so few validation users cannot show that it reads
    "policy.epochs=1",
    "evaluate.num_seeds=2",
    "evaluate.num_resamples=200",
]
AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")  # beginnings: the kernel cuts names short, psutil may not
ENGINES = {"vllm", "deepspeed", "ray"}


@dataclass(frozen=True)
class Finished:
    """A finished command: its folder, exit code and output."""

    folder: Path
    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())


def command(*arguments: str) -> list[str]:
    return [sys.executable, "jobs/run.py", *arguments]


def run_job(folder: Path, *arguments: str, timeout: int = 500, **env: str) -> Finished:
    """Run jobs/run.py with its run folder at folder/run; env: variables beside those of this process."""
    done = subprocess.run(
        command(*arguments, f"run.root={folder}", "run.name=run"),
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": "", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Finished(folder / "run", done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def local_ray(num_cpus: int, store_mib: int = 80) -> Iterator[None]:
    """A Ray of this process alone, small enough to start in seconds."""
    import ray
    import ray.data

    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=store_mib * 2**20,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def kill_driver(process: subprocess.Popen[Any]) -> None:
    """Kill a job's driver and wait until its workers have ended by themselves."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    end_by_themselves(children)


def end_by_themselves(children: Sequence[psutil.Process]) -> None:
    """Wait until the processes of a driver that is gone have ended.

    Ray's two agents may outlive their raylet, which they look for once a minute; they hold nothing of ours and are killed.
    """
    agents = [child for child in children if still_runs(child) and name_of(child).startswith(AGENTS)]
    workers = [child for child in children if child not in agents]
    deadline = time.monotonic() + 60
    while (alive := [child for child in workers if still_runs(child)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    for child in [*agents, *alive]:
        with contextlib.suppress(psutil.Error):
            child.kill()
    assert not alive, f"still there a minute after the driver's end: {alive}"


def name_of(process: psutil.Process) -> str:
    """ "" where it has ended."""
    with contextlib.suppress(psutil.Error):
        return process.name()
    return ""


def still_runs(process: psutil.Process) -> bool:
    """A zombie is dead; it waits for a parent that may never ask."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def until(condition: Callable[[], object], timeout_s: float) -> None:
    """Look again and again, until it is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s"
        time.sleep(0.3)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills once for all processes of a session (pytest -n). Nobody may change it afterwards."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


def finished_once(factory: pytest.TempPathFactory, name: str, *arguments: str) -> Finished:
    """A run that ended well, made once for all processes of a session."""

    def make(folder: Path) -> None:
        done = run_job(folder, *arguments)
        assert done.code == 0, done.stdout[-2000:] + done.stderr[-4000:]
        (folder / "output.json").write_text(json.dumps([done.stdout, done.stderr]))

    folder = made_once(factory, name, make)
    return Finished(folder / "run", 0, *json.loads((folder / "output.json").read_text()))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The whole method once: vLLM, Ray Data, Ray Train with DeepSpeed, at a size that takes about two minutes.

    A test that runs its command again takes `tiny_copy`.
    """
    return finished_once(tmp_path_factory, "tiny", DEMO, *TINY)


@pytest.fixture
def tiny_copy(tiny_run: Finished, tmp_path: Path) -> Path:
    """The folder that holds a copy of the tiny run, which a test may change."""
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    return tmp_path


SESSION = pytest.StashKey[pytest.Session]()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[SESSION] = session


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Once all is said, end a process that held engines without taking the interpreter down.

    Such a process has vLLM, DeepSpeed, gloo, Ray and numba side by side, as none of the product's has. Taking their threads
    and statics down once ended in a segmentation fault after 3,008 passed tests; where is not known. The product's own
    processes run apart, and the tests look at their exit codes.
    """
    if SESSION in config.stash and ENGINES & sys.modules.keys():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(config.stash[SESSION].exitstatus))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of minutes have three times as many, as other work may take half of the machine; GPU tests say why they do not run,
    instead of failing somewhere inside an engine.
    """
    for item in items:
        minutes = any(map(item.get_closest_marker, ("slow", "chaos")))
        if minutes and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))
