"""Hyper-parameter search under Ray Tune: the paper's grid (docs/method.md section 3), all of it or a random part.

A trial fits one reranker on the training lists and reports after every epoch. The validation lists alone choose, and no
other lists are read. Under ASHA a trial is stopped early unless its best validation metric so far is in the best third of
the trials that got as far. PRM and SetRank stay at popularity level for some epochs before they learn, so no trial is
stopped before half of its epochs. Trials that run at the same time reach that point in any order: two searches may stop
different ones.

Writes search/results.csv and results.md with every trial, and search/found.toml, a recipe fragment with the best settings
of each backbone. They are written again after each backbone. A search that was interrupted cannot be continued: the next
one starts from the beginning.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tomli_w
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.ranking import RerankerSection
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers.catalogue import Catalogue, tensor_of
from dpo4rec_ray.rerankers.fit import ListData
from dpo4rec_ray.rerankers.fit_knowledge import fit_reranker
from dpo4rec_ray.storage.places import Place, remove, write_text
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.progress import Progress, say
from dpo4rec_ray.store.reading import read_catalogue, read_list_data, read_vectors
from dpo4rec_ray.workers.placement import check_room
from dpo4rec_ray.workers.stage_workers import evaluation_tasks

Settings = dict[str, float]  # keys of the section [reranker]

# The paper's values.
BATCH_SIZES, RATES, DECAYS = (64, 128, 256, 512), (5e-4, 1e-3), (0.0, 1e-4, 1e-3)
EXPERTS = ((2, 5), (3, 4), (2, 6))  # shared, and dedicated to either side

FOLDER, TABLE, PAGE, FRAGMENT = "search", "results.csv", "results.md", "found.toml"
REDUCTION_FACTOR = 3  # of ASHA: one of so many trials continues
NUM_SHOWN = 3  # trials per backbone on the terminal
TUNE_ENV = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a box even with verbose=0
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files per trial
    # At Ctrl-C, Tune's own handler would return the trials so far as if they were all.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


def paper_grid(adapter: bool) -> list[Settings]:
    """Every combination of the paper's values; experts only where an adapter reads knowledge. 24, or 72."""
    experts: list[Settings] = [{}]
    if adapter:
        experts = [{"num_shared_experts": shared, "num_dedicated_experts": own} for shared, own in EXPERTS]
    return [
        {"batch_size": size, "lr": lr, "weight_decay": decay, **chosen}
        for size, lr, decay, chosen in itertools.product(BATCH_SIZES, RATES, DECAYS, experts)
    ]


@dataclass(frozen=True)
class SearchPlan:
    """What to search."""

    backbones: tuple[str, ...]
    knowledge: bool = False  # train with the vectors of the base LLM's texts
    adapter: bool = False  # search the adapter's experts too; reranker.knowledge = "regression" has none
    grid: tuple[Settings, ...] = ()  # empty: the paper's
    num_trials: int = 0  # per backbone, drawn at random from the grid; 0: all of it
    scheduler: Literal["asha", "none"] = "asha"
    concurrent: int = 0  # trials at a time; 0: as many as there are CPUs
    seed: int = 0  # of the draw, and of every trial's weights and batches

    def settings(self, run_seed: int) -> list[Settings]:
        """The trials of each backbone: distinct members of the grid, in its order."""
        grid = list(self.grid) or paper_grid(self.adapter)
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
    valid: float = -math.inf  # best value of the metric on the validation lists
    best_epoch: int = 0
    epochs: int = 0  # epochs that were finished
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


def run(config: Config, store: RunDir, plan: SearchPlan) -> list[Trial]:
    """Search each backbone in turn; write the results and return them, the best first within a backbone.

    Artifacts needed: users, items and lists; knowledge of round 0 where the plan asks for it.

    Raises:
        UserError: an artifact is missing, a trial needs more resources than Ray has, or every trial failed.
    """
    import ray

    os.environ.update(TUNE_ENV)
    check_room(evaluation_tasks(config))
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
        catalogue, vectors = read_catalogue(store), tensor_of(read_vectors(store, 0, "user")[1])
    else:
        attributes = store.read("items", columns=["attributes"])["attributes"].to_pylist()
        catalogue, vectors = Catalogue.from_items(attributes), None
    return Data(catalogue, read_list_data(store, "train"), read_list_data(store, "valid"), vectors)


def _trial_resources(config: Config) -> tune.PlacementGroupFactory:
    needs = evaluation_tasks(config).needs
    selector = {"bundle_label_selector": [needs.labels]} if needs.labels else {}
    return tune.PlacementGroupFactory(needs.bundles(), strategy=needs.strategy or "PACK", **selector)


def _search(config: Config, plan: SearchPlan, backbone: str, shared: Any, scratch: Place) -> list[Trial]:
    """All trials of one backbone, in the grid's order.

    Args:
        shared: Ray's reference to the Data.
        scratch: Tune's folder; it is removed again.
    """
    section = config.reranker.of(backbone)
    settings = plan.settings(config.run.seed)
    gpus = config.evaluate.gpus_per_task
    seed = seed_of(config.run.seed, "search", plan.seed, backbone)
    device = "cuda" if gpus else "cpu"
    trainable = tune.with_parameters(_fit_one, section=section, seed=seed, device=device, data=shared)
    total = _epochs(section, plan.knowledge)
    scheduler = None
    if plan.scheduler == "asha":
        scheduler = ASHAScheduler(
            max_t=total,
            grace_period=grace(total),
            reduction_factor=REDUCTION_FACTOR,
        )
    remove(scratch)
    try:
        with Progress(f"search {backbone}", len(settings) * total, "epochs") as progress:
            results = tune.Tuner(
                tune.with_resources(trainable, _trial_resources(config)),
                param_space={"settings": tune.grid_search(settings)},
                tune_config=tune.TuneConfig(
                    metric="best_valid",
                    mode="max",
                    scheduler=scheduler,
                    max_concurrent_trials=plan.concurrent or None,
                    reuse_actors=True,  # a new process would import torch and read the data again
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(
                    name=backbone,
                    storage_path=str(scratch),
                    verbose=0,
                    callbacks=[_ProgressCallback(progress, len(settings), total, section.metric)],
                ),
            ).fit()
            return [_trial(section, total, *pair) for pair in zip(settings, results, strict=True)]
    finally:
        remove(scratch)


def _epochs(section: RerankerSection, knowledge: bool) -> int:
    """Epochs of a trial, at most. Texts as input need no reranker without them first."""
    return section.total_epochs(int(not knowledge or section.knowledge != "input"), int(knowledge))


def _trial(section: RerankerSection, total: int, settings: Settings, result: tune.Result) -> Trial:
    """A row of the results; total: epochs of a trial that nothing ends. A trial that failed may have reported nothing."""
    what = (section.backbone, settings, section.metric)
    last, error = result.metrics or {}, ""
    if result.error is not None:
        error = str(result.error).strip().splitlines()[-1].strip()  # above it is the traceback
    if "epoch" not in last:
        return Trial(*what, ended=f"failed: {error or 'it did not start'}")
    epochs, best_epoch, error = last["epoch"], last["best_epoch"], error or last["failure"]
    ended = "complete"
    if error:
        ended = f"failed: {error}"
    elif not last["finished"]:
        ended = "stopped by the scheduler"
    elif epochs < total:
        ended = "out of patience"
    return Trial(*what, last["best_valid"], best_epoch, epochs, last["seconds"], ended)


def grace(epochs: int) -> int:
    """Number of epochs before which no trial is stopped: half of them, and at least 4."""
    return min(epochs, max(4, math.ceil(epochs / 2)))


def _fit_one(
    trial: dict[str, Settings], section: RerankerSection, seed: int, device: str, data: Data
) -> None:
    """A trial: fit with the values of trial["settings"], and report each epoch with the best one so far."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    section = section.model_copy(update=trial["settings"])
    number = itertools.count(1)
    state = {"epoch": 0, "best_valid": -math.inf, "best_epoch": 0, "finished": False, "failure": ""}

    def report() -> None:
        tune.report(state | {"seconds": time.perf_counter() - began})

    def on_epoch(record: dict[str, Any]) -> None:
        epoch, valid = next(number), record["valid"]
        # The last epoch waits for what texts add behind the fitted backbone: the scheduler ends a trial at its last report.
        if epoch > 1:
            report()
        state.update(
            epoch=epoch, **({"best_valid": valid, "best_epoch": epoch} if valid > state["best_valid"] else {})
        )

    try:
        found = fit_reranker(
            section.architecture,
            data.catalogue,
            data.train,
            data.valid,
            data.vectors,
            section.fit,
            seed=seed,
            place=lambda model: model.to(device),
            on_epoch=on_epoch,
        )
    except ValueError as error:
        # Usually a training that diverged. Reported and not raised, because Tune would start a new process for the next trial.
        state.update(failure=" ".join(str(error).split()))
    else:
        state.update(finished=True, best_valid=found.result.best_value)
    report()


class _ProgressCallback(tune.Callback):
    """Shows the epochs of all trials, and the best value so far. A trial that ended counts with all its epochs."""

    def __init__(self, progress: Progress, num_trials: int, epochs: int, metric: str):
        """epochs: of each trial, at most; metric: on the validation lists."""
        self._progress, self._num_trials, self._total, self._metric = progress, num_trials, epochs, metric
        self._epochs: dict[str, int] = {}  # per trial
        self._ended, self._best = 0, math.nan

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks to continue a search, which we never do

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        self._best = np.fmax(self._best, result["best_valid"])
        self._show(trial, result["epoch"])

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._ended += 1
        self._show(trial, self._total)

    on_trial_error = on_trial_complete

    def _show(self, trial: Any, epochs: int) -> None:
        self._epochs[trial.trial_id] = epochs
        best = f"best {self._metric} {self._best:.4f}"
        self._progress.at(sum(self._epochs.values()), f"{self._ended}/{self._num_trials} trials, {best}")


def write_results(folder: Place, trials: Sequence[Trial], about: Sequence[str]) -> None:
    """Write results.csv, results.md and found.toml. A backbone whose trials all failed is not in found.toml.

    Args:
        trials: the trials so far, the best first within a backbone.
        about: lines that say where they come from.
    """
    columns, rows = table(trials)
    content = io.StringIO(newline="")
    csv.writer(content).writerows([columns, *rows])
    write_text(folder / TABLE, content.getvalue())
    lines = [" | ".join(cells) for cells in (columns, ["---"] * len(columns), *rows)]
    page = [
        "# Hyper-parameter search",
        "",
        *(f"- {line}" for line in about),
        "",
        *(f"| {line} |" for line in lines),
    ]
    write_text(folder / PAGE, "\n".join(page) + "\n")
    write_text(folder / FRAGMENT, fragment(trials, about))


def table(trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """Column names, and one row of text per trial; a trial without a complete epoch has empty cells."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.settings))
    rows: list[list[str]] = []
    for trial in trials:
        metrics = ["", "", "", ""]
        if trial.epochs:
            metrics = [f"{trial.valid:.6f}", str(trial.best_epoch), str(trial.epochs), f"{trial.seconds:.1f}"]
        values = [str(trial.settings.get(key, "")) for key in keys]
        rows.append([trial.backbone, *values, trial.metric, *metrics, trial.ended])
    return ["backbone", *keys, "metric", "valid", "best epoch", "epochs", "seconds", "ended"], rows


def fragment(trials: Sequence[Trial], about: Sequence[str]) -> str:
    """The best settings of each backbone as TOML, to be merged over a recipe: dpo4rec run RECIPE found.toml."""
    lines = ["# Found by `dpo4rec search`; merge it over the recipe: dpo4rec run RECIPE found.toml"]
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
            tomli_w.dumps({"reranker": {"per_backbone": {backbone: best.settings}}}).rstrip(),
        ]
    return "\n".join(lines) + "\n"


def _about(config: Config, plan: SearchPlan, data: Data) -> list[str]:
    """Where the results come from."""
    num_trials = len(plan.settings(config.run.seed))
    scheduler = plan.scheduler
    if plan.scheduler == "asha":
        epochs = {name: _epochs(config.reranker.of(name), plan.knowledge) for name in plan.backbones}
        scheduler += "; stops from epoch "
        scheduler += ", ".join(f"{grace(number)} of {number} ({name})" for name, number in epochs.items())
    return [
        f"data: {config.data.dataset}, protocol {config.data.protocol}, run {config.run.name}, seed {config.run.seed}; "
        f"{len(data.train):,} training and {len(data.valid):,} validation lists",
        f"knowledge: {'base' if plan.knowledge else 'none'}; chosen on the validation lists",
        f"trials per backbone: {num_trials} of {len(plan.grid or paper_grid(plan.adapter))} in the grid, "
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
