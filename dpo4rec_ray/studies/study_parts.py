"""What a study is: the variants of a recipe that answer its question, and how their runs are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.intervals import Interval, seeds_bootstrap, signed
from dpo4rec_ray.store.artifacts import RunDir

RECIPE = "recipe"  # the run of the recipe as it is, which all variants are compared with
Changes = tuple[str, ...]  # section.key=value
Part = tuple[
    npt.NDArray[np.float64], npt.NDArray[np.int64]
]  # of one seed: values [n], and the user of each [n]


@dataclass(frozen=True)
class SeedRuns:
    """The finished runs of one seed: of the recipe, and of each variant by name. config: the recipe's."""

    seed: int
    config: Config
    recipe: RunDir
    variants: Mapping[str, RunDir]

    def run(self, name: str) -> RunDir:
        return self.recipe if name == RECIPE else self.variants[name]


@dataclass(frozen=True)
class Measured:
    """A figure per user or list, of each seed: a mean with an interval."""

    parts: tuple[Part, ...]

    @property
    def interval(self) -> Interval:
        """Over all seeds (`core.intervals.seeds_bootstrap`)."""
        return seeds_bootstrap(self.parts)

    @property
    def by_seed(self) -> list[Interval]:
        return [seeds_bootstrap([part]) for part in self.parts]

    def minus(self, other: Measured) -> Measured:
        """Paired differences.

        Raises:
            ValueError: the other is not of the same users in the same order.
        """
        found = []
        for (mine, users), (theirs, others) in zip(self.parts, other.parts, strict=True):
            if not np.array_equal(users, others):
                raise ValueError("figures of different users or lists are not paired")
            found.append((mine - theirs, users))
        return Measured(tuple(found))


Cell = Measured | float | str | None
Row = dict[str, Cell]  # column -> what is shown there; the first column is the row's name
NAME = "variant"  # the first column


@dataclass(frozen=True)
class Study:
    """
    Attributes:
        variants: the recipe -> name -> keys that a variant changes. Raises UserError where the recipe has no such study.
        rows: the runs of every seed -> the table.
        sentence: the table -> what it says, with intervals.
        shown: columns of the plot.
        needs: variants that its rows or its sentence cannot do without; None: all of them.
        needs_policy: False where recipes whose texts no LLM writes have such a study too.
        judged_by: whose reward rerankers say what texts of validation users are worth.
    """

    variants: Callable[[Config], dict[str, Changes]]
    rows: Callable[[Sequence[SeedRuns]], list[Row]]
    sentence: Callable[[Sequence[Row]], str]
    shown: tuple[str, ...]
    needs: tuple[str, ...] | None = ()
    needs_policy: bool = True
    judged_by: str = "the reward rerankers of the recipe's own run, for all variants"


def said(cell: Cell) -> str:
    """A cell as a reader sees it: "+0.113 [+0.085, +0.143]"."""
    if isinstance(cell, Measured):
        found = cell.interval
        if not any(values.any() for values, _ in cell.parts):
            return "0"  # what all else is measured against
        return signed(found.mean, (found.low, found.high))
    if cell is None:
        return ""
    return cell if isinstance(cell, str) else f"{cell:,.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"


def by_name(rows: Sequence[Row]) -> dict[str, Row]:
    """The rows by their names."""
    return {str(row[NAME]): row for row in rows}


def measured(row: Row, column: str) -> Measured:
    """A cell that is a figure with an interval."""
    cell = row[column]
    assert isinstance(cell, Measured), f"{column} of {row[NAME]} is {cell!r}"
    return cell
