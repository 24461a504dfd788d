"""What of a run is finished, running and left, from its folder alone: the driver may be on another machine, or gone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.pipeline import made, steps
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.heartbeat import LOST_AFTER_S, Heartbeat, read_heartbeat

RUNNING, LOST, STOPPED = "running", "lost", "not running"
FINISHED, LEFT, EARLIER, SKIPPED = "finished", "left", "made earlier", "not needed"


@dataclass(frozen=True)
class Step:
    """A stage in a round.

    Attributes:
        state: "finished", "running", "left", "made earlier" (complete, but the job that runs has not come to it, and may make it
            anew), "not needed" (a round after the last).
        seconds: that it took, or has taken so far; None where it has not run.
        progress: of the stage that runs, as store.progress.figures.
    """

    stage: str
    round: int
    state: str
    rows_in: int | None = None
    rows: int | None = None
    seconds: float | None = None
    progress: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Status:
    """A whole run.

    Attributes:
        state: "running"; "lost": the driver says nothing any more, so it is dead or cut off from the storage; "finished",
            "interrupted" or "failed: " and the reason, as its last job ended; "not running" where no job left word.
        sign_age_s: seconds since the driver's last sign of life, by the clocks of two machines; None without one.
    """

    run: str
    state: str
    sign_age_s: float | None
    node: str
    pid: int | None
    steps: list[Step]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def status(config: Config, store: RunDir, now: float) -> Status:
    """The status of a run at `now`, in seconds since 1970.

    Raises:
        UserError: a manifest cannot be read.
    """
    beat = read_heartbeat(store)
    state = _state(beat, now)
    return Status(
        store.root.name,
        state,
        round(beat.age(now), 1) if beat else None,
        beat.node if beat else "",
        beat.pid if beat else None,
        list(_steps(config, store, beat if state in (RUNNING, LOST) else None)),
    )


def _state(beat: Heartbeat | None, now: float) -> str:
    if beat is None:
        return STOPPED
    return beat.ended or (RUNNING if beat.age(now) < LOST_AFTER_S else LOST)


def _steps(config: Config, store: RunDir, beat: Heartbeat | None) -> Iterator[Step]:
    """beat: of the job that is at work; None if there is none."""
    order = steps(config)
    found = {step: made(store, *step) for step in order}
    at_work = next((step for step in order if beat and _same(step, beat)), None)
    evaluated = found[order[-1]] is not None
    reached = True
    for step in order:
        manifest = found[step]
        if beat and step == at_work:
            reached = False
            yield Step(*step, RUNNING, seconds=round(beat.time - beat.stage_began, 1), progress=beat.progress)
        elif manifest is None:
            yield Step(*step, SKIPPED if evaluated and step[1] and reached else LEFT)
        else:
            state = FINISHED if reached or not at_work else EARLIER
            yield Step(*step, state, manifest.rows_in, manifest.rows, manifest.seconds)


def _same(step: tuple[str, int], beat: Heartbeat) -> bool:
    """`evaluate` belongs to whatever round was the last."""
    return step[0] == beat.stage and (step[0] == "evaluate" or step[1] == beat.round)


def lines(found: Status) -> Iterator[str]:
    """For a terminal: the run, then a line per step."""
    sign = (
        "no job has left word"
        if found.sign_age_s is None
        else f"last sign of life {_span(found.sign_age_s)} ago"
    )
    where = f" (node {found.node}, process {found.pid})" if found.node else ""
    yield f"{found.run}: {found.state}; {sign}{where}"
    for step in found.steps:
        label = f"{step.stage}({step.round})"
        yield f"  {label:<16}{step.state:<14}{', '.join(_about(step))}".rstrip()


def _about(step: Step) -> Iterator[str]:
    if step.rows is not None and step.seconds is not None:
        yield f"{step.rows_in:,} rows in, {step.rows:,} out, {_span(step.seconds)}"
    elif step.seconds is not None:
        yield f"{_span(step.seconds)} so far"
    for one in step.progress:
        total = f"/{one['total']:,}" if one["total"] else ""
        yield f"{one['label']} {one['done']:,}{total} {one['unit']}" + (
            f": {one['starting']}" if one["starting"] else ""
        )
        if one["rate"] is not None:
            yield f"{one['rate']:,.1f}/s"
        if one["left_s"] is not None:
            yield f"{_span(one['left_s'])} left"


def _span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
