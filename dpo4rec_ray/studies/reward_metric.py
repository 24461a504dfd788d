"""Study "reward_metric": train on one reward, measure by all."""

from __future__ import annotations

from collections.abc import Sequence

from dpo4rec_ray.config import Config
from dpo4rec_ray.studies.measures import GAIN, TEST, TEST_AGAINST, Point, held_out, tested
from dpo4rec_ray.studies.study_parts import NAME, RECIPE, Changes, Row, SeedRuns, Study, measured, said

METRICS = ("log_likelihood", "ndcg@5", "map@5", "mrr@10")


def gain_in(metric: str) -> str:
    """The column of a metric."""
    return f"gain in {metric}"


def variants(config: Config) -> dict[str, Changes]:
    others = [metric for metric in METRICS if metric != config.reward.metric]
    return {f"trained on {metric}": (f'reward.metric="{metric}"',) for metric in others}


def rows(seeds: Sequence[SeedRuns]) -> list[Row]:
    own = seeds[0].config.reward.metric
    points = [Point(RECIPE), *(Point(name, run=name) for name in seeds[0].variants)]
    gains = {metric: held_out(seeds, points, metric=metric) for metric in dict.fromkeys((own, *METRICS))}
    test = tested(seeds, points)
    found: list[Row] = []
    for point in points:
        name = f"trained on {own} ({RECIPE})" if point.name == RECIPE else point.name
        row: Row = {NAME: name}
        row |= {gain_in(metric): by_point[point.name][GAIN] for metric, by_point in gains.items()}
        level = f"{test[point.name].interval.mean:.4f}"
        found.append({**row, TEST: level, TEST_AGAINST: test[point.name].minus(test[RECIPE])})
    return found


def sentence(rows: Sequence[Row]) -> str:
    columns = [column for column in rows[0] if column.startswith("gain in ")]
    told = []
    for column in columns:
        best = max(rows, key=lambda row: measured(row, column).interval.mean)
        told.append(f"{column.removeprefix('gain in ')} grows most when {best[NAME]} ({said(best[column])})")
    return f"Of the held-out users' metrics, {'; '.join(told)}."


STUDY = Study(
    variants,
    rows,
    sentence,
    tuple(gain_in(metric) for metric in METRICS),
)
