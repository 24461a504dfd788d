"""The plan of a run: time, GPU hours and storage of every stage, from sizes, rates and what each stage has to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError, nearest
from dpo4rec_ray.pipeline import STAGES, rounds, steps
from dpo4rec_ray.planning.rates import Measured, Rate, measured, rate_of
from dpo4rec_ray.planning.sizes import Sizes, sizes_of_run
from dpo4rec_ray.planning.work import WORK, Machine, Work, sampled_users
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.train.learners import LEARNERS

# Stages that write models, whose size does not grow with users.
WEIGHTS = ("bootstrap", "train_reward", *LEARNERS)


@dataclass(frozen=True)
class StepPlan:
    """A stage in a round.

    Attributes:
        seconds: wall time; None where no rate is known, 0 where there is nothing to do.
        gpu_hours: of the GPUs that are held, busy or not.
        bytes: of its artifacts; None where no run says it.
    """

    stage: str
    round: int
    work: Work
    rate: Rate | None
    seconds: float | None
    gpu_hours: float | None
    bytes: float | None


@dataclass(frozen=True)
class Plan:
    """A whole run. The sums leave out the stages in `unknown`, which have no rate."""

    sizes: Sizes
    steps: list[StepPlan]
    seconds: float
    gpu_hours: float
    bytes: float
    texts: int
    prompt_tokens: int
    text_tokens: int
    unknown: list[str]
    assumed: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FinishedRun:
    """A run that rates are taken from."""

    config: Config
    store: RunDir
    sizes: Sizes

    @classmethod
    def open(cls, config: Config, store: RunDir) -> FinishedRun:
        """Raises UserError if its data is not prepared."""
        return cls(config, store, sizes_of_run(config, store))


def rates_of_runs(runs: Sequence[FinishedRun], machine: Machine) -> dict[tuple[str, int], Rate]:
    """(stage, 0 or 1) -> its rate before the rounds, or in a round: `encode` does other work there."""
    points: dict[tuple[str, int], list[Measured]] = {}
    for run in runs:
        for name, number in steps(run.config):
            manifest = run.store.manifest(*STAGES[name].writes(number)[-1])
            if manifest is None:
                continue
            work = WORK[name](run.config, run.sizes, machine, number)
            points.setdefault(_key(name, number), []).append(measured(manifest, work.amount / work.workers))
    return {key: rate for key, found in points.items() if (rate := rate_of(found))}


def with_given(
    rates: Mapping[tuple[str, int], Rate], given: Mapping[str, float]
) -> dict[tuple[str, int], Rate]:
    """The rates with those over them that the user gave: STAGE (units per second of a worker) and STAGE.start (seconds).

    Raises:
        UserError: no such stage, or no positive number.
    """
    found = dict(rates)
    for name, value in given.items():
        stage, dot, what = name.partition(".")
        if stage not in WORK or (dot and what != "start"):
            raise UserError(f"--rate {name}: not STAGE or STAGE.start{nearest(stage, list(WORK))}")
        if value < 0 or (not dot and value == 0):
            raise UserError(f"--rate {name}={value:g}: give units per second above 0, or seconds of start")
    for stage in WORK:
        for key in {(stage, 0), (stage, 1)}:
            old = found.get(key)
            per_s = given.get(stage, old.per_s if old else None)
            if per_s is not None:
                found[key] = Rate(given.get(f"{stage}.start", old.start_s if old else 0.0), per_s)
    return found


def plan(
    config: Config,
    sizes: Sizes,
    rates: Mapping[tuple[str, int], Rate],
    machine: Machine,
    runs: Sequence[FinishedRun] = (),
) -> Plan:
    """What the recipe takes. Pure but for the manifests of `runs`, which say how large artifacts are."""
    planned = []
    for name, number in steps(config):
        work = WORK[name](config, sizes, machine, number)
        rate = rates.get(_key(name, number)) if work.amount else None
        seconds = rate.seconds(work.amount / work.workers) if rate else None if work.amount else 0.0
        hours = None if seconds is None else work.gpus * seconds / 3600
        planned.append(
            StepPlan(name, number, work, rate, seconds, hours, _bytes(name, number, work, machine, runs))
        )
    texts, prompt_tokens, text_tokens = _texts(config, sizes)
    assumed = [
        *sizes.assumed,
        f"{machine.cpus:g} CPUs and {machine.gpus:g} GPUs, there and here; twice the workers take half of the time",
        f"all {config.run.max_rounds} rounds and all epochs are run; patience may end them earlier",
        "a stage takes the seconds of its start, and then its work at the measured rate",
    ]
    if config.llm.source == "openai":
        assumed.append("an endpoint writes as fast as in the run, whatever its limits are")
    seconds = sum(one.seconds or 0 for one in planned)
    if machine.gpus:
        hours = machine.gpus * seconds / 3600
        assumed.append(
            f"GPU hours are of what stages hold; {machine.gpus:g} GPUs from start to end are {hours:.1f} hours"
        )
    unknown = list(dict.fromkeys(one.stage for one in planned if one.seconds is None))
    if unknown:
        assumed.append(
            f"no rate is known of {', '.join(unknown)}: not in the sums; give --from-run RUN or --rate STAGE=NUMBER"
        )
    if nowhere := dict.fromkeys(one.stage for one in planned if one.bytes is None):
        assumed.append(f"no run says how much storage {', '.join(nowhere)} take: not in the sums")
    return Plan(
        sizes,
        planned,
        seconds,
        gpu_hours=sum(one.gpu_hours or 0 for one in planned),
        bytes=sum(one.bytes or 0 for one in planned),
        texts=texts,
        prompt_tokens=prompt_tokens,
        text_tokens=text_tokens,
        unknown=unknown,
        assumed=assumed,
    )


def _texts(config: Config, sizes: Sizes) -> tuple[int, int, int]:
    """Texts, tokens of prompts and tokens of texts over all rounds; no tokens where no LLM writes."""
    tested = sizes.test * config.test_texts
    texts, prompts = sizes.users - sizes.test + tested, sizes.users  # round 0
    for turn, names in rounds(config).items():
        sampled = sampled_users(config, sizes, turn)
        texts += sampled * config.generate.num_samples
        prompts += sampled
        if "encode" in names:
            texts += sizes.train + tested + sizes.valid * config.generate.num_samples
            prompts += sizes.users
    if config.llm.source not in ("vllm", "openai"):
        return round(texts), 0, 0
    return round(texts), round(prompts * sizes.prompt_tokens), round(texts * sizes.text_tokens)


def _bytes(name: str, number: int, work: Work, machine: Machine, runs: Sequence[FinishedRun]) -> float | None:
    """Of the largest run's artifacts, grown as the work has; weights of models do not grow."""
    for run in sorted(runs, key=lambda one: -one.sizes.users):
        place = 0 if name == "train_reward" else min(number, max(rounds(run.config), default=0))
        made = [run.store.manifest(*artifact) for artifact in STAGES[name].writes(place)]
        found = [one for one in made if one is not None]
        if found and (size := sum(one.bytes for one in found)):
            then = WORK[name](run.config, run.sizes, machine, place)
            return size if name in WEIGHTS or not then.amount else size * work.amount / then.amount
    return None


def _key(name: str, number: int) -> tuple[str, int]:
    # The first texts are also written for items; training of the reward is the same every time.
    return name, 0 if name == "train_reward" else min(number, 1)
