"""The whole method on one page: which stage reads and writes what.

    histories -> prepare -> encode(0) -> train_reward
    round r:  generate -> score -> pair -> dpo -> encode(r) -> validate
              (policy.objective: best_of_n or grpo in place of pair -> dpo;
              run.retrain_reward: train_reward(r) before generate, from round 2 on)
    then:     evaluate -> report

Round r samples from policy r-1 (policy 0 is the base LLM) and trains policy r. Where llm.source is no policy there is
nothing to train: the round ends with its pairs. Without rounds there is no reward either. What is run again is decided in
running.py.

With several turns per round, the number r of a stage, an artifact and a policy counts turns: every turn samples, scores and
trains, and encode and validate follow the last turn of a round alone (RunSection.ends_round).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.recipe import RunSection
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
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.train.learners import LEARNERS

Artifact = tuple[str, int]  # name, round


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
# What a text depends on. identity.dependencies adds the section of an llm.source that has one of its own.
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
            # The raw files stand for the folder that they are in (identity.outside_identity).
            sections=("data", "-data.raw_dir", "table", "logged", "sample", "reward.num_folds"),
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
            # Not evaluate.num_texts: a change that concerns test users alone must not train the LLM anew.
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
            reads=lambda run, r: [
                ("lists", 0),
                *(("knowledge", i) for i in dict.fromkeys((0, max(0, r - 1)))),
                ("references", 0),
            ],
            writes=lambda r: [("reward", r)],
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
                ("reward", run.reward_of(r)),
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
            reads=lambda run, r: [
                ("generations", r),
                ("scores", r),
                ("knowledge", 0),
                *((("pairs", r - 1),) if run.keep_pairs and r > 1 else ()),
            ],
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


def before_rounds(config: Config) -> list[str]:
    """Those of `BEFORE_ROUNDS` that this recipe needs."""
    needed = {
        "bootstrap": config.has_policy and config.llm.path == "bootstrap",
        "train_reward": config.run.max_rounds > 0,
    }
    return [name for name in BEFORE_ROUNDS if needed.get(name, True)]


def rounds(config: Config) -> dict[int, tuple[str, ...]]:
    """The stages of each turn that this recipe may come to."""
    if config.has_policy:
        return {turn: _stages_of(config, turn) for turn in range(1, config.run.num_turns + 1)}
    return {1: UNTRAINED_ROUND} if config.run.max_rounds else {}  # evaluate sees round 0 alone


def _stages_of(config: Config, turn: int) -> tuple[str, ...]:
    objective, run = config.policy.objective_of(turn), config.run
    before = ("train_reward",) if turn == run.reward_of(turn) else ()
    after = AFTER_ROUND if run.ends_round(turn) else ()
    return (*before, *SAMPLED, *(("pair",) if objective == "dpo" else ()), objective, *after)


def steps(config: Config) -> list[tuple[str, int]]:
    """All steps (stage, round) that this recipe may come to, in order, but for `report`, which leaves no manifest."""
    found = [(name, 0) for name in before_rounds(config)]
    found += [(name, number) for number, names in rounds(config).items() for name in names]
    return [*found, ("evaluate", max(rounds(config), default=0) if config.has_policy else 0)]


def made(store: RunDir, name: str, number: int) -> Manifest | None:
    """The manifest of a step whose artifacts are all complete; None if one is not."""
    found = [store.manifest(*artifact) for artifact in STAGES[name].writes(number)]
    return found[-1] if all(found) else None


def how_far(store: RunDir, objectives: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """The stages that are complete in a run folder, in one round at least where they belong to rounds, and the others.

    objectives: whose stages count; none: that of the run's first policy, "dpo" where there is none.
    """
    policy = store.manifest("policy", 1)
    objectives = objectives or {policy.stats.get("objective", "dpo") if policy else "dpo"}
    others = {*LEARNERS, *(() if "dpo" in objectives else ("pair",))} - set(objectives)
    names = [name for name in STAGES if name not in others]
    numbers = [0, *sorted(int(folder.name) for folder in store.root.glob("rounds/[0-9]*"))]
    done = {name for name in STAGES if any(made(store, name, number) for number in numbers)}
    return [name for name in names if name in done], [name for name in names if name not in done]
