"""The whole method on one page: which stage reads and writes what, and when it must run again.

    histories -> prepare -> encode(0) -> train_reward
    round r:  generate -> score -> pair -> dpo -> encode(r) -> validate
              (policy.objective: best_of_n or grpo in place of pair -> dpo)
    then:     evaluate -> report

Round r samples from policy r-1 (policy 0 is the base LLM) and trains policy r. Where llm.source is no policy there is
nothing to train: the round ends with its pairs. Without rounds there is no reward either. A stage whose manifests carry
the fingerprint of its present inputs and config sections is skipped.

With several turns per round, the number r of a stage, an artifact and a policy counts turns: every turn samples, scores and
trains, and encode and validate follow the last turn of a round alone (RunSection.ends_round).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

from dpo4rec_ray import identity
from dpo4rec_ray.config import Config
from dpo4rec_ray.config.recipe import RunSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.report import page
from dpo4rec_ray.stages import (
    bootstrap,
    encode,
    evaluate,
    generate,
    pair,
    prepare,
    references,
    score,
    train_policy,
    train_reward,
    validate,
)
from dpo4rec_ray.store import events, progress
from dpo4rec_ray.store.artifacts import Manifest, RunDir, write_json
from dpo4rec_ray.store.dependencies import Dependencies
from dpo4rec_ray.store.heartbeat import beating
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.texts.engines import release_engines
from dpo4rec_ray.texts.sources import SOURCES
from dpo4rec_ray.train.learners import LEARNERS
from dpo4rec_ray.workers.run_metrics import stage_metrics

logger = logging.getLogger(__name__)

Artifact = tuple[str, int]  # name, round
NOT_THERE = "not there yet"


@dataclass(frozen=True)
class Stage:
    """One step: `run(config, store, round_id)` reads `reads` and writes `writes`.

    `sections` are the config values that can change what it writes: "section" (all but its keys of placement), "section.key", or
    "-section.key", which leaves one out.
    """

    name: str
    run: Callable[[Config, RunDir, int], Outcome]
    reads: Callable[[RunSection, int], list[Artifact]]
    writes: Callable[[int], list[Artifact]]
    sections: tuple[str, ...]


PROMPT = ("prompt", "-prompt.describe_items")
# What a text depends on. The section of an llm.source that has one of its own comes from identity.outside_identity.
TEXTS = ("llm", *PROMPT, "generate", "-generate.user_frac")
TURNS = ("run.turns_per_round", "run.watched_users")
POLICY = ("policy", "-policy.objective")  # which the stage's own name says
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in [
        Stage(
            "prepare",
            prepare.run,
            reads=lambda run, r: [],
            writes=lambda r: [("users", 0), ("items", 0), ("truth", 0), ("lists", 0)],
            sections=("data", "table", "logged", "sample", "reward.num_folds"),
        ),
        Stage(
            "bootstrap",
            bootstrap.run,
            reads=lambda run, r: [("users", 0), ("items", 0)],
            writes=lambda r: [("base_llm", 0)],
            sections=("bootstrap", *PROMPT, "data.max_history"),
        ),
        Stage(
            "encode",
            encode.run,
            reads=lambda run, r: [("users", 0), ("items", 0), ("policy", r)],
            writes=lambda r: [("knowledge", r)],
            sections=(*TEXTS, "prompt.describe_items", "encoder", "reward.reader_texts"),
        ),
        Stage(
            "references",
            references.run,
            reads=lambda run, r: [("users", 0), ("items", 0), ("lists", 0)],
            writes=lambda r: [("references", 0)],
            sections=(
                "encoder",
                "reward.reader",
                "reward.reader_texts",
                "reward.oracle",
                "evaluate.references",
                "llm.source",
                "data.positive_rating",
                "prompt.ratings",
            ),
        ),
        Stage(
            "train_reward",
            train_reward.run,
            reads=lambda run, r: [("lists", 0), ("knowledge", 0), ("references", 0)],
            writes=lambda r: [("reward", 0)],
            sections=(
                "reranker",
                "reward.num_folds",
                "reward.num_workers",
                "reward.reader",
                "evaluate.references",
            ),
        ),
        Stage(
            "generate",
            generate.run,
            reads=lambda run, r: [("users", 0), ("items", 0), ("policy", r - 1)],
            writes=lambda r: [("generations", r)],
            sections=(*TEXTS, "generate.user_frac", *TURNS),
        ),
        Stage(
            "score",
            score.run,
            reads=lambda run, r: [
                *(("generations", i) for i in dict.fromkeys((r, run.first_turn(r)))),
                *(
                    (("scores", run.first_turn(r)),) if r > run.first_turn(r) else ()
                ),  # what a turn is compared with
                ("lists", 0),
                ("knowledge", 0),
                ("reward", 0),
            ],
            writes=lambda r: [("metric_scores", r), ("scores", r)],
            sections=(
                "reward.metric",
                "reward.compare",
                "reward.num_redraws",
                "reward.hard_negatives",
                "reward.personal",
                "encoder",
                "run.turns_per_round",
            ),
        ),
        Stage(
            "pair",
            pair.run,
            reads=lambda run, r: [("generations", r), ("scores", r), ("knowledge", 0)],
            writes=lambda r: [("pairs", r)],
            sections=("pair", "policy.max_heldout_users", "data.positive_rating"),
        ),
        Stage(
            "dpo",
            train_policy.run,
            reads=lambda run, r: [("pairs", r), ("policy", r - 1)],
            writes=lambda r: [("policy", r)],
            sections=("llm", *POLICY, "dpo"),
        ),
        *(
            Stage(
                name,
                train_policy.run,
                reads=lambda run, r: [("generations", r), ("scores", r), ("policy", r - 1)],
                writes=lambda r: [("policy", r)],
                sections=("llm", *POLICY, name),
            )
            for name in LEARNERS
            if name != "dpo"
        ),
        Stage(
            "validate",
            validate.run,
            reads=lambda run, r: [
                ("generations", run.first_turn(r)),
                *(("knowledge", i) for i in (r, 0)),
                ("lists", 0),
                ("reward", 0),
                *(("heldout", i) for i in run.round_ends(r - 1) if i),  # of which the best is the one to beat
            ],
            writes=lambda r: [("heldout", r)],
            sections=("reward.metric", "reward.num_redraws", "reward.hard_negatives", "encoder"),
        ),
        Stage(
            "evaluate",
            evaluate.run,
            reads=lambda run, r: [
                ("lists", 0),
                ("references", 0),
                *(("knowledge", i) for i in run.round_ends(r)),
            ],
            writes=lambda r: [("per_list", 0)],
            sections=("reranker", "evaluate", "llm.source"),
        ),
    ]
}
BEFORE_ROUNDS = ("prepare", "bootstrap", "encode", "references", "train_reward")
SAMPLED = ("generate", "score")  # of each turn
AFTER_ROUND = ("encode", "validate")
UNTRAINED_ROUND = (*SAMPLED, "pair")  # where llm.source is no policy
AFTER_ROUNDS = ("evaluate", "report")


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


def before_rounds(config: Config) -> list[str]:
    """Those of `BEFORE_ROUNDS` that this recipe needs."""
    needed = {
        "bootstrap": config.has_policy and config.llm.path == "bootstrap",
        "train_reward": config.run.num_rounds > 0,
    }
    return [name for name in BEFORE_ROUNDS if needed.get(name, True)]


def rounds(config: Config) -> dict[int, tuple[str, ...]]:
    """The stages of each turn that this recipe may come to."""
    if config.has_policy:
        return {turn: _stages_of(config, turn) for turn in range(1, config.run.num_turns + 1)}
    return {1: UNTRAINED_ROUND} if config.run.num_rounds else {}  # evaluate sees round 0 alone


def _stages_of(config: Config, turn: int) -> tuple[str, ...]:
    objective = config.policy.objective_of(turn)
    after = AFTER_ROUND if config.run.ends_round(turn) else ()
    return (*SAMPLED, *(("pair",) if objective == "dpo" else ()), objective, *after)


def steps(config: Config) -> list[tuple[str, int]]:
    """All steps (stage, round) that this recipe may come to, in order, but for `report`, which leaves no manifest."""
    found = [(name, 0) for name in before_rounds(config)]
    found += [(name, number) for number, names in rounds(config).items() for name in names]
    return [*found, ("evaluate", max(rounds(config), default=0) if config.has_policy else 0)]


def check_selection(config: Config, selection: Selection) -> None:
    """Raises UserError if this recipe has no such step; that rounds ended before it shows only while they run."""
    wanted = selection.only or selection.since
    steps = {0: (*before_rounds(config), *AFTER_ROUNDS), **rounds(config)}
    possible = [number for number, names in steps.items() if wanted in names]
    in_round = selection.round_id in (None, *possible) or wanted in AFTER_ROUNDS
    if wanted and not (possible and in_round):
        raise selection.missing()


def how_far(store: RunDir, objectives: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """The stages that are complete in a run folder, in one round at least where they belong to rounds, and the others.

    objectives: whose stages count; none: that of the run's first policy, "dpo" where there is none.
    """
    policy = store.manifest("policy", 1)
    objectives = objectives or {policy.stats.get("objective", "dpo") if policy else "dpo"}
    others = {*LEARNERS, *(() if "dpo" in objectives else ("pair",))} - set(objectives)
    names = [name for name in STAGES if name not in others]
    numbers = [0, *sorted(int(folder.name) for folder in store.root.glob("rounds/[0-9]*"))]
    done = {
        name
        for name, stage in STAGES.items()
        if any(all(store.manifest(*artifact) for artifact in stage.writes(number)) for number in numbers)
    }
    return [name for name in names if name in done], [name for name in names if name not in done]


def run_pipeline(config: Config, store: RunDir, selection: Selection = Selection()) -> dict[str, object]:
    """Run the method, skipping what is complete, and return the summary. `checks.check_all(config)` comes before.

    Raises:
        UserError: something in the recipe, the input or the machine that the user can mend.
    """
    began = time.monotonic()
    store.root.mkdir(parents=True, exist_ok=True)
    if not selection.narrow:
        write_json(store.root / "config.json", config.model_dump(mode="json"))
    runner = Runner(config, store, selection)
    with events.recorded(store) as log, beating(store, log):
        try:
            last_round = _all_stages(runner)
        finally:
            release_engines()
        if runner.selected("report", last_round):
            return page.run(config, store, last_round, runner.log, time.monotonic() - began)
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
        if runner.peaked(round_id):
            number = config.run.round_of(round_id)
            say(f"round {number}: no longer better than the best round so far; no further round")
            break
    runner.step("evaluate", last_round)
    return last_round


class Runner:
    """Decides per step: not selected, kept, or run; keeps the log that summary.json shows."""

    def __init__(self, config: Config, store: RunDir, selection: Selection):
        self.config, self.store, self.selection = config, store, selection
        self.log: list[dict[str, Any]] = []
        self.matched = False
        self._since_reached = not selection.since

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
            train_reward.check_reads(self.config, self.store)
        began = time.monotonic()
        say(f"{name}({round_id}): started" + (f", {why}" if why != NOT_THERE else ""))
        events.note("stage_started", why=why)
        progress.take_timings()  # those of an earlier stage are no part of this one
        self.store.fingerprint = depends.fingerprint
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

    def peaked(self, round_id: int) -> bool:
        """Whether rounds no longer improve, so that no further round follows."""
        run = self.config.run
        ends = run.ends_round(round_id) and round_id < run.num_turns
        return ends and validate.rounds_have_peaked(run, self.store, round_id)

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
        return manifest


class DryRun(Runner):
    """Says what each step would do and why, and does nothing."""

    def __init__(self, config: Config, store: RunDir, selection: Selection):
        super().__init__(config, store, selection)
        self._remade: dict[Artifact, str] = {}  # -> the step that would write it

    def step(self, name: str, round_id: int) -> None:
        stage, label = STAGES[name], f"{name}({round_id})"
        if not self.selected(name, round_id):
            self.tell(label, "not selected")
            return
        self.matched = True
        reads = stage.reads(self.config.run, round_id)
        before = [self._remade[artifact] for artifact in reads if artifact in self._remade]
        why = f"after {before[0]}" if before else self.why(stage, round_id, self.depends(stage, round_id))
        self.tell(label, f"would run: {why}" if why else "kept")
        if why:
            self._remade |= dict.fromkeys(stage.writes(round_id), label)
            if name == "bootstrap":
                self._remade["policy", 0] = label  # the LLM that it trains

    def peaked(self, round_id: int) -> bool:
        return ("heldout", round_id) not in self._remade and super().peaked(round_id)

    def tell(self, label: str, what: str) -> None:
        print(f"{label:<16}{what}")


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
