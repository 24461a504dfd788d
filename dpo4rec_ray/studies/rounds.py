"""Study "rounds": what further rounds add. Every round is of one run, which does not stop early."""

from __future__ import annotations

from collections.abc import Sequence

from dpo4rec_ray.config import Config
from dpo4rec_ray.studies.ablation import BASE_LLM
from dpo4rec_ray.studies.measures import GAIN, READING, STYLE, TEST_AGAINST, Point, standard_rows
from dpo4rec_ray.studies.study_parts import NAME, Changes, Measured, Row, SeedRuns, Study, measured, said
from dpo4rec_ray.studies.variants import last_turn

LONG, LEAST = "all rounds", 3
STEP = "reward gain against the round before"


def variants(config: Config) -> dict[str, Changes]:
    most = max(LEAST, config.run.max_rounds)
    return {LONG: (f"run.num_rounds={most}", f"run.patience={most}")}


def rows(seeds: Sequence[SeedRuns]) -> list[Row]:
    section = seeds[0].config.run
    last = min(last_turn(seed.run(LONG)) for seed in seeds)
    points = [
        Point(BASE_LLM if not turn else f"round {section.round_of(turn)}", LONG, turn)
        for turn in section.round_ends(last)
    ]
    found = standard_rows(seeds, points)
    for row, before in zip(found[1:], found, strict=False):
        row[STEP] = measured(row, GAIN).minus(measured(before, GAIN))
    return found


def sentence(rows: Sequence[Row]) -> str:
    added = "; ".join(f"{row[NAME]} adds {said(row[STEP])}" for row in rows[1:])
    helped = [row for row in rows[1:] if isinstance(step := row[STEP], Measured) and step.interval.low > 0]
    last = helped[-1][NAME] if helped else "none"
    return f"Held-out reward: {added}. The last round whose gain is beyond its interval: {last}."


STUDY = Study(variants, rows, sentence, (GAIN, READING, STYLE, TEST_AGAINST))
