"""Study "history_length": how much of a user's history the prompt has to show."""

from __future__ import annotations

from collections.abc import Sequence

from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.studies.measures import GAIN, TEST_AGAINST, Point, held_out, standard_rows
from dpo4rec_ray.studies.study_parts import NAME, RECIPE, Changes, Row, SeedRuns, Study, said

UNTRAINED = "reward of its base LLM"  # since the recipe's base LLM


def variants(config: Config) -> dict[str, Changes]:
    most = longest(config)
    found: dict[str, Changes] = {
        called(most // part): (f"prompt.max_events={most // part}",) for part in (8, 4, 2) if most // part
    }
    if not found:
        raise UserError(f"study history_length: prompts show {most} event; raise data.max_history")
    return found


def longest(config: Config) -> int:
    """Most events that the recipe's prompts show. The candidate lists begin after data.max_history events, which stay."""
    return config.prompt.max_events or config.data.max_history


def called(events: int) -> str:
    return f"{events} event{'s' if events > 1 else ''}"


def rows(seeds: Sequence[SeedRuns]) -> list[Row]:
    points = [*(Point(name, run=name) for name in seeds[0].variants), Point(RECIPE)]
    untrained = held_out(seeds, [Point(point.name, point.run, turn=0) for point in points])
    found = standard_rows(seeds, points)
    for row in found:
        name = str(row[NAME])
        row[UNTRAINED] = untrained[name][GAIN]
        row[NAME] = name if name != RECIPE else f"{called(longest(seeds[0].config))} ({RECIPE})"
    return found


def sentence(rows: Sequence[Row]) -> str:
    shown = "; ".join(f"{row[NAME]} {said(row[GAIN])}" for row in rows)
    return (
        f"Held-out reward after DPO, since the base LLM that sees the whole history: {shown}. Before DPO, with "
        f"{rows[0][NAME]}: {said(rows[0][UNTRAINED])}."
    )


STUDY = Study(
    variants,
    rows,
    sentence,
    (GAIN, UNTRAINED, TEST_AGAINST),
)
