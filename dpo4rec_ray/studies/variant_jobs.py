"""Runs the recipe and its variants, each as a process of its own, some at a time; what is finished is not started again."""

from __future__ import annotations

import ctypes
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo4rec_ray.checks import check_all
from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.running import is_finished
from dpo4rec_ray.storage.places import Place, place
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.studies.every_study import run_name
from dpo4rec_ray.studies.study_parts import RECIPE, Changes, SeedRuns, Study
from dpo4rec_ray.studies.variants import OWN_POLICY, lend, trained_policy

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_LOOK_S = 0.5


@dataclass(frozen=True)
class Job:
    """One run of a study. arguments: of `dpo4rec run`."""

    name: str
    seed: int
    arguments: tuple[str, ...]
    config: Config

    @property
    def store(self) -> RunDir:
        return RunDir(place(self.config.run.root) / self.config.run.name)

    @property
    def command(self) -> str:
        return shlex.join(["dpo4rec", "run", *self.arguments])


def folder_of(config: Config, study: str) -> Place:
    """Where a study of a recipe lives: beside the recipe's own run."""
    return place(config.run.root) / run_name(config.run.name, study)


def planned(
    name: str,
    study: Study,
    recipe: str | Path,
    changes: Sequence[str],
    seeds: Sequence[int],
    only: Sequence[str] = (),
) -> list[Job]:
    """The jobs of a study, each seed's recipe first. Nothing is started.

    The recipe's own run is the one that `dpo4rec run` makes; those of other seeds stand beside it. only: these variants, and
    those that the study needs; none: all.

    Raises:
        UserError: the recipe, or a variant of it, cannot be run, or there is no variant of a name.
    """
    plain = load_config(recipe, list(changes))
    if study.needs_policy and not (plain.has_policy and plain.run.num_rounds):
        raise UserError(
            f"study {name}: nothing is trained in this recipe (llm.source = {plain.llm.source!r}, run.num_rounds = "
            f'{plain.run.num_rounds}); studies need llm.source = "vllm" and one round at least'
        )
    variants = study.variants(plain)
    for reserved in {RECIPE} & variants.keys():
        raise ValueError(f"a variant cannot be called {reserved!r}")
    for unknown in set(only) - variants.keys():
        raise UserError(f"study {name} has no variant {unknown!r}; there are: {'; '.join(variants)}")
    if only and study.needs is None:
        raise UserError(f"study {name} needs all of its variants; leave --variant out")
    if only and study.needs is not None:
        variants = {one: keys for one, keys in variants.items() if one in (*only, *study.needs)}
    found = []
    for seed in seeds or [plain.run.seed]:
        own = f"{plain.run.name}-seed{seed}" if seed != plain.run.seed else plain.run.name
        base = _job(RECIPE, seed, recipe, changes, (_value("run.name", own),))
        found.append(base)
        own_policy = _value("llm.path", trained_policy(base.config))
        for variant, keys in variants.items():
            keys = tuple(own_policy if key == f"llm.path={OWN_POLICY}" else key for key in keys)
            where = (
                _value("run.root", str(folder_of(plain, name))),
                _value("run.name", f"{folder_name(variant)}-seed{seed}"),
            )
            found.append(_job(variant, seed, recipe, changes, (*keys, *where)))
    for job in found:
        if job.seed == found[0].seed:  # checks do not depend on the seed
            check_all(checkable(job.config, plain), "")
    return found


def checkable(config: Config, plain: Config) -> Config:
    """A variant's settings as they can be checked before the recipe's run has trained the policy that they may name."""
    return config.model_copy(update={"llm": config.llm.model_copy(update={"path": plain.llm.path})})


def _job(name: str, seed: int, recipe: str | Path, changes: Sequence[str], keys: Changes) -> Job:
    arguments = (str(recipe), *changes, f"run.seed={seed}", *keys)
    return Job(name, seed, arguments, load_config(recipe, list(arguments[1:])))


def folder_name(variant: str) -> str:
    """A variant's name as part of a path."""
    return "".join(sign if sign.isalnum() or sign in ".=" else "-" for sign in variant)


def run_jobs(jobs: Sequence[Job], at_a_time: int) -> list[SeedRuns]:
    """Run what is not finished: first the recipe in every seed, then the variants, which start from its artifacts.

    Raises:
        UserError: a run failed; those beside it are ended. What is complete is kept for the next time.
    """
    recipes = [job for job in jobs if job.name == RECIPE]
    bases = {job.seed: job.store for job in recipes}
    _run_some(recipes, at_a_time)
    variants = [job for job in jobs if job.name != RECIPE]
    for job in variants:
        lend(bases[job.seed], job.store)
    _run_some(variants, at_a_time)
    return [
        SeedRuns(
            job.seed,
            job.config,
            job.store,
            {one.name: one.store for one in variants if one.seed == job.seed},
        )
        for job in recipes
    ]


def _run_some(jobs: Sequence[Job], at_a_time: int) -> None:
    waiting, running = list(jobs), dict[int, tuple[Job, subprocess.Popen[bytes]]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job = waiting.pop(0)
                if is_finished(job.config, job.store):
                    say(f"study: {job.name}, seed {job.seed}: finished before, {job.store.root}")
                    continue
                say(f"study: {job.name}, seed {job.seed}: {job.command}")
                process = _started(job)
                running[process.pid] = job, process
            for pid, (job, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[pid]
                if process.returncode:
                    raise UserError(
                        f"{job.name}, seed {job.seed}: `{job.command}` ended with code {process.returncode}; mend what it says "
                        "above, and the same study goes on from there"
                    )
            if running:
                time.sleep(_LOOK_S)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def _started(job: Job) -> subprocess.Popen[bytes]:
    # sys.stderr: descriptor 2 may be a log by now.
    return subprocess.Popen(
        [sys.executable, "-m", "dpo4rec_ray", "run", *job.arguments],
        stderr=sys.stderr.fileno(),
        preexec_fn=_end_with_parent,
    )


def _end_with_parent() -> None:
    """In the child: a study that is killed leaves no run behind, which would hold its folder against the next one."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _value(key: str, text: str) -> str:
    """key=text, with a text that TOML could read as something else in quotes."""
    return f"{key}={json.dumps(text)}"
