"""Hyper-parameter search under Ray Tune: the paper's grid (method.md section 3), whole or a random part of it.

A trial fits one reranker on the training lists and reports after every epoch; the validation lists alone choose, and no
other list is read. Under ASHA a trial ends early when its best figure so far is not in the best third of those that got
as far. PRM and SetRank sit at popularity level for epochs before they climb, so that this is first asked after half of the
epochs. Several trials at a time reach that point in any order: which ones end there may differ between two searches.

Written below the run folder: search/results.csv and results.md with every trial, and search/found.toml, a recipe fragment
with the best settings of each backbone. They are written anew after each backbone; a search that was interrupted is not
continued, the next one begins from the start.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.ranking import RerankerSection
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers import Catalogue, build_reranker
from dpo4rec_ray.rerankers.fit import ListData, fit
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.progress import Progress, say
from dpo4rec_ray.store.reading import (
    fit_settings,
    read_catalogue,
    read_list_data,
    read_vectors,
    reranker_settings,
)
from dpo4rec_ray.workers.placement import check_room

Settings = dict[str, float]  # keys of the section [reranker]

TRAINING_AXES: tuple[tuple[Settings, ...], ...] = (
    tuple({"batch_size": size} for size in (64, 128, 256, 512)),
    tuple({"lr": lr} for lr in (5e-4, 1e-3)),
    tuple({"weight_decay": decay} for decay in (0.0, 1e-4, 1e-3)),
)
EXPERT_AXIS: tuple[Settings, ...] = tuple(
    {"num_shared_experts": shared, "num_dedicated_experts": dedicated}
    for shared, dedicated in ((2, 5), (3, 4), (2, 6))
)

FOLDER, TABLE, PAGE, FRAGMENT = "search", "results.csv", "results.md", "found.toml"
KEPT_SHARE = 3  # one in so many trials goes on
NUM_SHOWN = 3  # trials per backbone on the terminal
TUNE_ENV = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a box even when it is to be quiet
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files per trial
    # Tune's own handler would end the search at Ctrl-C and hand over what there is as if it were all.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


def paper_grid(knowledge: bool) -> list[Settings]:
    """Every combination of the paper's values; experts only where an adapter reads knowledge. 24, or 72."""
    axes = (*TRAINING_AXES, EXPERT_AXIS) if knowledge else TRAINING_AXES
    return [
        {key: value for part in parts for key, value in part.items()} for parts in itertools.product(*axes)
    ]


@dataclass(frozen=True)
class Plan:
    """What to search."""

    backbones: tuple[str, ...]
    knowledge: bool = False  # train with the base LLM's vectors
    grid: tuple[Settings, ...] = ()  # empty: the paper's
    num_trials: int = 0  # per backbone, drawn at random from the grid; 0: all of it
    scheduler: Literal["asha", "none"] = "asha"
    concurrent: int = 0  # trials at a time; 0: as many as there are CPUs
    seed: int = 0  # of the draw, and of every trial's weights and batches

    def settings(self, run_seed: int) -> list[Settings]:
        """The trials of each backbone: distinct members of the grid, in its order."""
        grid = list(self.grid) or paper_grid(self.knowledge)
        if not 0 < self.num_trials < len(grid):
            return grid
        rng = np.random.default_rng(seed_of(run_seed, "search", self.seed))
        return [grid[i] for i in sorted(rng.choice(len(grid), self.num_trials, replace=False))]


@dataclass(frozen=True)
class Trial:
    """One row of the results."""

    backbone: str
    settings: Settings
    metric: str
    valid: float = -math.inf  # best figure on the validation lists
    best_epoch: int = 0
    epochs: int = 0  # run
    seconds: float = 0.0
    ended: str = "complete"  # or "stopped by the scheduler", "out of patience", "failed: <reason>"

    @property
    def failed(self) -> bool:
        return self.ended.startswith("failed")


@dataclass(frozen=True)
class Data:
    """What every trial reads."""

    catalogue: Catalogue
    train: ListData
    valid: ListData
    vectors: torch.Tensor | None  # [U, D]; None without knowledge


def run(config: Config, store: RunDir, plan: Plan) -> list[Trial]:
    """Search each backbone in turn; write the results and return them, the best first within a backbone.

    Artifacts needed: users, items and lists; knowledge of round 0 where the plan asks for it.

    Raises:
        UserError: an artifact is missing, a trial needs more than this machine has, or every trial failed.
    """
    import ray

    os.environ.update(TUNE_ENV)
    gpus = config.evaluate.gpus_per_task
    check_room("the trials of the search", 1, gpus)
    folder = store.root / FOLDER
    folder.mkdir(exist_ok=True)
    data = _read(store, plan.knowledge)
    shared = ray.put(data)
    about = _about(config, plan, data)
    trials: list[Trial] = []
    for backbone in plan.backbones:
        found = _search(config, plan, backbone, shared, folder / "tune")
        trials += sorted(found, key=lambda trial: (trial.failed, -trial.valid))
        write_results(folder, trials, about)
        _say_best(trials, backbone)
    if all(trial.failed for trial in trials):
        raise UserError(f"search: no trial came to its end; the first one {trials[0].ended}")
    return trials


def _read(store: RunDir, knowledge: bool) -> Data:
    if knowledge:
        catalogue, vectors = read_catalogue(store), torch.from_numpy(read_vectors(store, 0, "user")[1])
    else:
        attributes = store.read("items", columns=["attributes"])["attributes"].to_pylist()
        catalogue, vectors = Catalogue.from_items(attributes), None
    return Data(catalogue, read_list_data(store, "train"), read_list_data(store, "valid"), vectors)


def _search(config: Config, plan: Plan, backbone: str, shared: Any, scratch: Path) -> list[Trial]:
    """All trials of one backbone. `shared`: reference of the Data; `scratch`: Tune's folder, removed again."""
    section = config.reranker.of(backbone)
    settings = plan.settings(config.run.seed)
    gpus = config.evaluate.gpus_per_task
    seed = seed_of(config.run.seed, "search", plan.seed, backbone)
    device = "cuda" if gpus else "cpu"
    trainable = tune.with_parameters(
        _fit_one, section=section, settings=settings, seed=seed, device=device, data=shared
    )
    scheduler = None
    if plan.scheduler == "asha":
        scheduler = ASHAScheduler(
            max_t=section.epochs, grace_period=grace(section.epochs), reduction_factor=KEPT_SHARE
        )
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with Progress(f"search {backbone}", len(settings) * section.epochs, "epochs") as progress:
            follower = _Follower(progress, len(settings), section)
            tune.Tuner(
                tune.with_resources(trainable, {"cpu": 1, "gpu": gpus}),
                param_space={"number": tune.grid_search(list(range(len(settings))))},
                tune_config=tune.TuneConfig(
                    metric="best_valid",
                    mode="max",
                    scheduler=scheduler,
                    max_concurrent_trials=plan.concurrent or None,
                    reuse_actors=True,  # a new process would import torch and read the data again
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(
                    name=backbone, storage_path=str(scratch), verbose=0, callbacks=[follower]
                ),
            ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [follower.row(number, values) for number, values in enumerate(settings)]


def grace(epochs: int) -> int:
    """Epochs that no trial is stopped in: half of them, and at least 4."""
    return min(epochs, max(4, math.ceil(epochs / 2)))


def _fit_one(
    trial: dict[str, int],
    section: RerankerSection,
    settings: list[Settings],
    seed: int,
    device: str,
    data: Data,
) -> None:
    """A trial: fit with the values of `settings[trial["number"]]`, reporting each epoch and the best so far."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    section = section.model_copy(update=settings[trial["number"]])
    knowledge = data.vectors is not None
    model = build_reranker(
        section.backbone, data.catalogue.shape, knowledge, reranker_settings(section), seed=seed
    ).to(device)
    last_epoch, best_epoch, best_valid = 0, 0, -math.inf

    def report(failure: str = "") -> None:
        tune.report(
            {
                "epoch": last_epoch,
                "best_valid": best_valid,
                "best_epoch": best_epoch,
                "seconds": time.perf_counter() - began,
                "failure": failure,
            }
        )

    def on_epoch(record: dict[str, Any]) -> None:
        nonlocal last_epoch, best_epoch, best_valid
        last_epoch = record["epoch"]
        if record["valid"] > best_valid:
            best_epoch, best_valid = last_epoch, record["valid"]
        report()

    try:
        fit(
            model,
            data.catalogue,
            data.train,
            data.valid,
            data.vectors,
            fit_settings(section, seed),
            on_epoch=on_epoch,
        )
    except (UserError, ValueError) as error:
        # Diverged, as a rule. The process is fit for the next trial; one that raises is replaced, which takes seconds.
        report(failure=" ".join(str(error).split()))


@dataclass
class _Follower(tune.Callback):
    """Keeps every trial's last report and shows the progress; by number, as a trial that failed may have reported nothing."""

    progress: Progress
    num_trials: int
    section: RerankerSection
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks, to restore an experiment; a search is never restored

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        self.reports[trial.config["number"]] = result
        self._show()

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.ended.add(trial.config["number"])
        self._show()

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.ended.add(trial.config["number"])
        lines = Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines()
        self.failures[trial.config["number"]] = lines[-1].strip()  # above it is the traceback
        self._show()

    def row(self, number: int, settings: Settings) -> Trial:
        """The trial's row of the results."""
        what = (self.section.backbone, settings, self.section.metric)
        last = self.reports.get(number)
        if last is None:
            reason = self.failures.get(number, "it did not start")
            return Trial(*what, ended=f"failed: {reason}")
        epochs, best_epoch = last["epoch"], last["best_epoch"]
        failure = self.failures.get(number, last["failure"])
        ended = "complete"
        if failure:
            ended = f"failed: {failure}"
        elif self.section.patience and epochs - best_epoch >= self.section.patience:
            ended = "out of patience"
        elif epochs < self.section.epochs:
            ended = "stopped by the scheduler"
        return Trial(*what, last["best_valid"], best_epoch, epochs, last["seconds"], ended)

    def _show(self) -> None:
        epochs = sum(
            self.section.epochs if number in self.ended else self.reports[number]["epoch"]
            for number in self.ended | self.reports.keys()
        )
        best = max((report["best_valid"] for report in self.reports.values()), default=math.nan)
        self.progress.at(
            epochs, f"{len(self.ended)}/{self.num_trials} trials, best {self.section.metric} {best:.4f}"
        )


def write_results(folder: Path, trials: Sequence[Trial], about: Sequence[str]) -> None:
    """results.csv, results.md and found.toml of the trials so far; `about` says where they come from.

    trials: the best first within a backbone. A backbone whose trials all failed is not in found.toml.
    """
    columns, rows = table(trials)
    with open(folder / TABLE, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([columns, *rows])
    lines = [" | ".join(cells) for cells in (columns, ["---"] * len(columns), *rows)]
    page = [
        "# Hyper-parameter search",
        "",
        *(f"- {line}" for line in about),
        "",
        *(f"| {line} |" for line in lines),
    ]
    (folder / PAGE).write_text("\n".join(page) + "\n", encoding="utf-8")
    (folder / FRAGMENT).write_text(fragment(trials, about), encoding="utf-8")


def table(trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """Titles, and one row of text per trial; figures of a trial that reported none stay empty."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.settings))
    rows: list[list[str]] = []
    for trial in trials:
        figures = ["", "", "", ""]
        if trial.epochs:
            figures = [f"{trial.valid:.6f}", str(trial.best_epoch), str(trial.epochs), f"{trial.seconds:.1f}"]
        values = [str(trial.settings.get(key, "")) for key in keys]
        rows.append([trial.backbone, *values, trial.metric, *figures, trial.ended])
    return ["backbone", *keys, "metric", "valid", "best epoch", "epochs", "seconds", "ended"], rows


def fragment(trials: Sequence[Trial], about: Sequence[str]) -> str:
    """The best settings of each backbone as TOML, to be merged over a recipe: jobs/run.py RECIPE.toml found.toml."""
    lines = ["# Found by jobs/search.py; merge it over the recipe: jobs/run.py RECIPE.toml found.toml"]
    lines += [f"# {line}" for line in about]
    for backbone in dict.fromkeys(trial.backbone for trial in trials):
        own = [trial for trial in trials if trial.backbone == backbone]
        best = own[0]
        if best.failed:
            continue
        lines += [
            "",
            f"# valid {best.metric} {best.valid:.6f} at epoch {best.best_epoch}, the best of {len(own)} trials, "
            f"{sum(trial.failed for trial in own)} of which failed",
            f"[reranker.per_backbone.{backbone}]",
            *(f"{key} = {value!r}" for key, value in best.settings.items()),
        ]
    return "\n".join(lines) + "\n"


def _about(config: Config, plan: Plan, data: Data) -> list[str]:
    """Where the results come from."""
    num_trials = len(plan.settings(config.run.seed))
    scheduler = plan.scheduler
    if plan.scheduler == "asha":
        epochs = {name: config.reranker.of(name).epochs for name in plan.backbones}
        scheduler += "; stops from epoch "
        scheduler += ", ".join(f"{grace(number)} of {number} ({name})" for name, number in epochs.items())
    return [
        f"data: {config.data.dataset}, protocol {config.data.protocol}, run {config.run.name}, seed {config.run.seed}; "
        f"{len(data.train):,} training and {len(data.valid):,} validation lists",
        f"knowledge: {'base' if plan.knowledge else 'none'}; chosen on the validation lists",
        f"trials per backbone: {num_trials} of {len(plan.grid or paper_grid(plan.knowledge))} in the grid, "
        f"search seed {plan.seed}",
        f"scheduler: {scheduler}",
    ]


def _say_best(trials: Sequence[Trial], backbone: str) -> None:
    own = [trial for trial in trials if trial.backbone == backbone]
    columns, rows = table(own[:NUM_SHOWN])
    widths = [max(len(cell) for cell in cells) for cells in zip(columns, *rows, strict=True)]
    failed = sum(trial.failed for trial in own)
    say(f"search {backbone}: the best of {len(own)} trials" + (f", {failed} failed" if failed else ""))
    for row in (columns, *rows):
        say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
