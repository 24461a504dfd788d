"""Figures of the runs of a study, all by the same yardstick: the rerankers and the lists of the recipe's own run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.config import Config, read_config
from dpo4rec_ray.evaluation.heldout_texts import UserTexts, with_derived
from dpo4rec_ray.evaluation.per_list import PerList
from dpo4rec_ray.evaluation.run_comparison import ComparedRun, check_same_lists
from dpo4rec_ray.evaluation.systems import HEADLINE, NO_BACKBONE
from dpo4rec_ray.stages.evaluate import system_name
from dpo4rec_ray.stages.validate import open_measure, side_figures, texts_after, texts_before
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.studies.study_parts import NAME, RECIPE, Measured, Part, Row, SeedRuns
from dpo4rec_ray.studies.variants import last_turn

NDCG = "ndcg@5"
LAST = -1  # the turn that a run ended with
# Columns of the table that most studies have.
GAIN, AGAINST = "held-out reward gain", "reward gain against the recipe"
READING, STYLE = "reading gain", "style gain"
TEST, TEST_GAIN, TEST_AGAINST = "test NDCG@5", "test NDCG@5 gain", "test NDCG@5 against the recipe"
_START = "the recipe's base LLM"
FIGURES = {GAIN: "reward", READING: "reading", STYLE: "others_reward"}


@dataclass(frozen=True)
class Point:
    """A row of a table: texts of a run. turn: whose policy wrote them; 0: the base LLM; None: there are no texts."""

    name: str
    run: str = RECIPE
    turn: int | None = LAST

    def turn_in(self, store: RunDir) -> int | None:
        return last_turn(store) if self.turn == LAST else self.turn


def standard_rows(seeds: Sequence[SeedRuns], points: Sequence[Point]) -> list[Row]:
    """Held-out reward, reading and style, and the test users' NDCG@5: since the recipe's base LLM, and against the recipe."""
    every = [*points, *([] if any(point.name == RECIPE for point in points) else [Point(RECIPE)])]
    held, test = held_out(seeds, every), tested(seeds, [*every, Point(_START, turn=0)])
    found: list[Row] = []
    for point in points:
        row: Row = {NAME: point.name}
        if point.name in held:
            own = held[point.name]
            row |= {GAIN: own[GAIN], AGAINST: own[GAIN].minus(held[RECIPE][GAIN])}
            row |= {READING: own[READING], STYLE: own[STYLE]}
        else:
            row |= dict.fromkeys((GAIN, AGAINST, READING, STYLE))
        mine = test[point.name]
        row |= {TEST: _mean(mine), TEST_GAIN: mine.minus(test[_START])}
        found.append({**row, TEST_AGAINST: mine.minus(test[RECIPE])})
    return found


def held_out(
    seeds: Sequence[SeedRuns], points: Sequence[Point], metric: str = ""
) -> dict[str, dict[str, Measured]]:
    """Each point that has texts -> the columns of FIGURES: change since the base LLM's texts per validation user.

    The reward rerankers of the recipe's run judge the texts of all runs. metric: of the reward; "": the recipe's.
    """
    per_seed = [_held_out(seed, points, metric) for seed in seeds]
    return {
        name: {column: Measured(tuple(one[name][column] for one in per_seed)) for column in FIGURES}
        for name in per_seed[0]
    }


def _held_out(seed: SeedRuns, points: Sequence[Point], metric: str) -> dict[str, dict[str, Part]]:
    config = seed.config
    if metric:
        config = config.model_copy(update={"reward": config.reward.model_copy(update={"metric": metric})})
    before = texts_before(config, seed.recipe, 1)
    sides: dict[str, UserTexts] = {"": before}
    for point in points:
        store = seed.run(point.run)
        turn = point.turn_in(store)
        if turn == 0 and point.run != RECIPE:
            sides[point.name] = texts_before(config_of(store), store, 1)
        elif turn is not None:
            sides[point.name] = texts_after(store, turn) if turn else before
    users, figures = open_measure(config, seed.recipe).figures(sides)
    start = with_derived(figures.pop(""))
    return {
        name: {
            column: (with_derived(own)[figure] - start[figure], users) for column, figure in FIGURES.items()
        }
        for name, own in figures.items()
    }


def tested(
    seeds: Sequence[SeedRuns], points: Sequence[Point], metric: str = NDCG, backbone: str = ""
) -> dict[str, Measured]:
    """Each point -> a metric of HEADLINE per test list, mean over the fits of `evaluate`. backbone: "": the recipe's first.

    Raises:
        UserError: a run has other test lists than the recipe's.
    """
    per_seed = [_tested(seed, points, metric, backbone) for seed in seeds]
    return {point.name: Measured(tuple(one[point.name] for one in per_seed)) for point in points}


def _tested(seed: SeedRuns, points: Sequence[Point], metric: str, backbone: str) -> dict[str, Part]:
    backbone = backbone or seed.config.evaluated_backbones[0]
    names = dict.fromkeys([RECIPE, *(point.run for point in points)])
    runs = {name: ComparedRun.open(str(seed.run(name).root)) for name in names}
    check_same_lists(list(runs.values()))
    lists = {name: lists_of(run) for name, run in runs.items()}
    return {
        point.name: level(
            lists[point.run],
            backbone,
            system_name(runs[point.run].config, point.turn_in(seed.run(point.run))),
            metric,
        )
        for point in points
    }


def lists_of(run: ComparedRun) -> PerList:
    """The metrics of HEADLINE of the fitted systems, list by list."""
    fitted = run.per_list["backbone"] != NO_BACKBONE
    return PerList.of(pd.DataFrame(run.per_list[fitted]), HEADLINE)


def level(lists: PerList, backbone: str, system: str, metric: str = NDCG) -> Part:
    """A metric per list, mean over the fits of a system, and each list's user."""
    column = lists.names.index(metric)
    fits = [lists.values[backbone, system, seed][:, column] for seed in lists.systems[backbone, system]]
    return np.mean(fits, axis=0).astype(np.float64), lists.users


def own_gain(store: RunDir) -> dict[str, Part]:
    """The columns of FIGURES as `validate` found them by the run's own rerankers, from the base LLM to the last round."""
    run = config_of(store).run
    first, last = (store.read("heldout", turn) for turn in (run.turns_per_round, last_turn(store)))
    users = np.intersect1d(first["user_id"], last["user_id"])
    first, last = (table.filter(pc.is_in(table["user_id"], pa.array(users))) for table in (first, last))
    before, after = with_derived(side_figures(first, "before")), with_derived(side_figures(last, "after"))
    return {column: (after[figure] - before[figure], users) for column, figure in FIGURES.items()}


def _mean(measured: Measured) -> str:
    """A level, which has no interval of interest beside its difference."""
    return f"{measured.interval.mean:.4f}"


def config_of(store: RunDir) -> Config:
    """The settings of a variant's run."""
    return read_config(str(store.root))
