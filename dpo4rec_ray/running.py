"""Runs the stages of a recipe, or a selection of them, and decides for each whether it has to run again.

A stage whose manifests carry the fingerprint of its present inputs and config sections is skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dpo4rec_ray import identity
from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.pipeline import AFTER_ROUNDS, STAGES, UNTRAINED_ROUND, Artifact, Stage, before_rounds, rounds
from dpo4rec_ray.report import page
from dpo4rec_ray.report.tracking import RunTracking, tracked
from dpo4rec_ray.stages import train_reward, validate
from dpo4rec_ray.storage.places import remove
from dpo4rec_ray.store import events, progress
from dpo4rec_ray.store.artifacts import Manifest, RunDir, write_json
from dpo4rec_ray.store.dependencies import Dependencies
from dpo4rec_ray.store.final import promote, withdraw
from dpo4rec_ray.store.heartbeat import beating
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.texts.engines import release_engines
from dpo4rec_ray.texts.sources import SOURCES
from dpo4rec_ray.train.learners import LEARNERS
from dpo4rec_ray.workers.run_metrics import stage_metrics

NOT_THERE = "not there yet"


@dataclass(frozen=True)
class Selection:
    """Which steps to run: `only` one stage, or everything `since` one; `round_id` narrows both to a round."""

    only: str = ""
    since: str = ""
    round_id: int | None = None

    @property
    def narrow(self) -> bool:
        return bool(self.only or self.since)

    @property
    def described(self) -> str:
        where = f" --round {self.round_id}" if self.round_id is not None else ""
        return f"--only {self.only}{where}" if self.only else f"--from {self.since}{where}"

    def missing(self) -> UserError:
        """The error of a selection that meets no step."""
        return UserError(f"no such step in this recipe: {self.described}")


def check_selection(config: Config, selection: Selection) -> None:
    """Raises UserError if this recipe has no such step; that rounds ended before it shows only while they run."""
    wanted = selection.only or selection.since
    steps = {0: (*before_rounds(config), *AFTER_ROUNDS), **rounds(config)}
    possible = [number for number, names in steps.items() if wanted in names]
    in_round = selection.round_id in (None, *possible) or wanted in AFTER_ROUNDS
    if wanted and not (possible and in_round):
        raise selection.missing()


def run_pipeline(config: Config, store: RunDir, selection: Selection = Selection()) -> dict[str, object]:
    """Run the method, skipping what is complete, and return the summary. `checks.check_all(config)` comes before.

    Raises:
        UserError: something in the recipe, the input or the machine that the user can mend.
    """
    began = time.monotonic()
    store.root.mkdir(parents=True, exist_ok=True)
    if not selection.narrow:
        write_json(store.root / "config.json", config.model_dump(mode="json"))
    with events.recorded(store) as log, beating(store, log), tracked(config, store) as tracking:
        runner = Runner(config, store, selection, tracking)
        try:
            last_round = _all_stages(runner)
        finally:
            release_engines()
        if runner.selected("report", last_round):
            summary = page.run(config, store, last_round, runner.log, time.monotonic() - began)
            tracking.links(last_round)
            return summary
        if not runner.matched:
            raise selection.missing()
        return {}


def _all_stages(runner: Runner) -> int:
    """Every stage in order; the last round that was trained."""
    config = runner.config
    for name in before_rounds(config):
        runner.step(name, 0)
    last_round = 0
    for round_id, names in rounds(config).items():
        for name in names:
            runner.step(name, round_id)
        if not config.has_policy:
            break
        last_round = round_id
        if why := runner.peaked(round_id):
            say(f"round {config.run.round_of(round_id)}: {why}; no further round")
            break
    runner.promote(last_round)
    runner.step("evaluate", last_round)
    return last_round


class Runner:
    """Decides per step: not selected, kept, or run; keeps the log that summary.json shows, and tells the trackers."""

    def __init__(
        self, config: Config, store: RunDir, selection: Selection, tracking: RunTracking | None = None
    ):
        self.config, self.store, self.selection = config, store, selection
        self.log: list[dict[str, Any]] = []
        self.matched = False
        self._since_reached = not selection.since
        self._tracking = tracking

    def selected(self, name: str, round_id: int) -> bool:
        """Whether --only, --from and --round let this step run."""
        wanted = self.selection
        in_round = wanted.round_id is None or wanted.round_id == round_id
        if wanted.only:
            return name == wanted.only and (in_round or name in AFTER_ROUNDS)
        if wanted.since and name == wanted.since and in_round:
            self._since_reached = True
        return self._since_reached

    def step(self, name: str, round_id: int) -> None:
        stage = STAGES[name]
        if not self.selected(name, round_id):
            self._note(stage, round_id, skipped=True)
            return
        self.matched = True
        events.entered(name, round_id)
        depends = self.depends(stage, round_id)
        why = self.why(stage, round_id, depends)
        target = self.store.path(*stage.writes(round_id)[-1])
        if not why:
            manifest = self._note(stage, round_id, skipped=True)
            events.note("stage_kept", rows=manifest.rows if manifest else 0)
            say(f"{name}({round_id}): kept, {manifest.rows if manifest else 0} rows, {target}")
            return
        if name in UNTRAINED_ROUND:
            train_reward.check_reads(self.config, self.store, round_id)
        began = time.monotonic()
        say(f"{name}({round_id}): started" + (f", {why}" if why != NOT_THERE else ""))
        events.note("stage_started", why=why)
        progress.take_timings()  # those of an earlier stage are no part of this one
        self.store.fingerprint = depends.fingerprint
        for summed_up in ("summary.json", "report.html"):  # what is made now is not what they speak of
            remove(self.store.root / summed_up)
        with stage_metrics(self.config.run.name, name, round_id):
            outcome = stage.run(self.config, self.store, round_id)
        seconds = round(time.monotonic() - began, 2)
        timings = [asdict(timing) for timing in progress.take_timings()]
        for artifact, artifact_round in stage.writes(round_id):
            manifest = outcome.manifest(artifact, depends, seconds, self.config.run.seed)
            manifest.bytes, manifest.timings = self.store.size(artifact, artifact_round), timings
            self.store.finish(manifest, artifact_round)
        self._note(stage, round_id, skipped=False)
        events.note("stage_finished", rows_in=outcome.rows_in, rows_out=outcome.rows_out, seconds=seconds)
        say(
            f"{name}({round_id}): {outcome.rows_in} rows in, {outcome.rows_out} out, {seconds:.1f} s, {target}"
        )

    def peaked(self, round_id: int) -> str:
        """Why no further round follows, as rounds no longer improve; "" where one does, or there are no more."""
        run = self.config.run
        ends = run.ends_round(round_id) and round_id < run.num_turns
        return validate.rounds_have_peaked(run, self.store, round_id) if ends else ""

    def promote(self, last_round: int) -> None:
        """Say which policy is the run's: the card in final/. Where nothing is trained there is none."""
        if not any(self.selected(name, last_round) for name in ("validate", "evaluate")):
            return
        if not last_round:
            withdraw(self.store)
        elif self.store.manifest("heldout", last_round):
            best = validate.best_round(self.store, last_round)
            found = promote(self.config.run, self.store, best, last_round)
            events.note("policy_promoted", number=found.policy)
            say(f"final policy: {found.folder or 'the base LLM'}, {found.why}")

    def depends(self, stage: Stage, round_id: int) -> Dependencies:
        """What the step's output depends on: its config, what comes from outside, and which production of each input."""
        inputs: dict[str, str] = {}
        for name, input_round in stage.reads(self.config.run, round_id):
            if (name, input_round) == ("policy", 0):  # the base LLM is no artifact of a round
                inputs["policy/0"] = SOURCES[self.config.llm.source].identity(self.config, self.store)
                continue
            manifest = self.store.manifest(name, input_round)
            if manifest is None:
                mine = STAGES.keys() - (LEARNERS.keys() - {self.config.policy.objective_of(input_round)})
                writers = (
                    one.name
                    for one in STAGES.values()
                    if one.name in mine and (name, input_round) in one.writes(input_round)
                )
                raise UserError(
                    f"stage {stage.name}: {self.store.path(name, input_round)} is missing or incomplete; run the stage "
                    f"{next(writers)} first"
                )
            inputs[f"{name}/{input_round}"] = manifest.produced
        return identity.dependencies(self.config, stage.name, round_id, stage.sections, inputs)

    def why(self, stage: Stage, round_id: int, depends: Dependencies) -> str:
        """Why a selected step has to run; "" where what it writes can be kept."""
        made = [self.store.manifest(name, r) for name, r in stage.writes(round_id)]
        complete = [manifest for manifest in made if manifest is not None]
        if len(complete) < len(made):
            return NOT_THERE
        if stage.name in (
            self.selection.only,
            self.selection.since,
        ):  # asked for by name: it is done, not skipped
            return f"forced by {'--only' if self.selection.only else '--from'}"
        return next(filter(None, map(depends.changes_since, complete)), "")

    def _note(self, stage: Stage, round_id: int, *, skipped: bool) -> Manifest | None:
        """Log the step as its manifest has it, if there is one."""
        manifest = self.store.manifest(*stage.writes(round_id)[-1])
        if manifest is not None:
            self.log.append(
                {
                    "stage": stage.name,
                    "round": round_id,
                    "seconds": manifest.seconds,
                    "rows_in": manifest.rows_in,
                    "rows_out": manifest.rows,
                    "skipped": skipped,
                }
            )
            if self._tracking:
                self._tracking.stage(stage.name, round_id, manifest)
        return manifest


class DryRun(Runner):
    """Says what each step would do and why, and does nothing. remade: artifact -> the step that would write it."""

    def __init__(
        self, config: Config, store: RunDir, selection: Selection, tell: Callable[[str], None] = print
    ):
        super().__init__(config, store, selection)
        self.remade: dict[Artifact, str] = {}
        self._tell = tell

    def step(self, name: str, round_id: int) -> None:
        stage, label = STAGES[name], f"{name}({round_id})"
        if not self.selected(name, round_id):
            self.tell(label, "not selected")
            return
        self.matched = True
        reads = stage.reads(self.config.run, round_id)
        before = [self.remade[artifact] for artifact in reads if artifact in self.remade]
        why = f"after {before[0]}" if before else self.why(stage, round_id, self.depends(stage, round_id))
        self.tell(label, f"would run: {why}" if why else "kept")
        if why:
            self.remade |= dict.fromkeys(stage.writes(round_id), label)
            if name == "bootstrap":
                self.remade["policy", 0] = label  # the LLM that it trains

    def peaked(self, round_id: int) -> str:
        return "" if ("heldout", round_id) in self.remade else super().peaked(round_id)

    def promote(self, last_round: int) -> None:
        """Writes nothing."""

    def tell(self, label: str, what: str) -> None:
        self._tell(f"{label:<16}{what}")


def is_finished(config: Config, store: RunDir) -> bool:
    """Whether a run of this recipe would keep every stage and has its summary. Starts no Ray.

    Raises:
        UserError: as `dry_run`.
    """
    runner = DryRun(config, store, Selection(), tell=lambda _: None)
    _all_stages(runner)
    return not runner.remade and (store.root / "summary.json").is_file()


def dry_run(config: Config, store: RunDir, selection: Selection) -> None:
    """Print what `run_pipeline` would do, step by step. Writes nothing and starts no Ray.

    Raises:
        UserError: as `run_pipeline`, as far as it is known without running a stage.
    """
    runner = DryRun(config, store, selection)
    last_round = _all_stages(runner)
    if runner.selected("report", last_round):
        runner.tell("report", "would run: it sums up what is there")
    elif not runner.matched:
        raise selection.missing()
