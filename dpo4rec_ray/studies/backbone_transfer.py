"""Study "backbone_transfer": the reward comes from one backbone, the texts serve another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo4rec_ray.config import Config
from dpo4rec_ray.evaluation.systems import label
from dpo4rec_ray.rerankers import RERANKERS
from dpo4rec_ray.studies.ablation import BASE_LLM
from dpo4rec_ray.studies.measures import Point, tested
from dpo4rec_ray.studies.study_parts import NAME, Changes, Measured, Row, SeedRuns, Study, said


def final(backbone: str) -> str:
    """The column of a final backbone: test NDCG@5 with the trained LLM's texts, minus that with the base LLM's."""
    return f"gain of {label(backbone)} on test users"


def rewarded_by(backbone: str) -> str:
    """The name of the variant whose reward comes from a backbone."""
    return f"reward from {label(backbone)}"


def variants(config: Config) -> dict[str, Changes]:
    every = ", ".join(f'"{name}"' for name in RERANKERS)
    return {
        rewarded_by(name): (f"reranker.backbone={name}", f"evaluate.backbones=[{every}]")
        for name in RERANKERS
    }


def rows(seeds: Sequence[SeedRuns]) -> list[Row]:
    found: list[Row] = [{NAME: name} for name in seeds[0].variants]
    for backbone in RERANKERS:
        for row in found:
            name = str(row[NAME])
            points = [Point(name, run=name), Point(BASE_LLM, run=name, turn=0)]
            test = tested(seeds, points, backbone=backbone)
            row[final(backbone)] = test[name].minus(test[BASE_LLM])
    return found


def sentence(rows: Sequence[Row]) -> str:
    own, other = [], []
    for row, mine in zip(rows, RERANKERS, strict=True):
        for backbone in RERANKERS:
            cell = row[final(backbone)]
            assert isinstance(cell, Measured)
            (own if backbone == mine else other).append(cell)
    return (
        "Test NDCG@5 that DPO adds to the base LLM's texts: where the reward's backbone is the final one "
        f"{said(mean_of(own))}, where it is another {said(mean_of(other))}."
    )


def mean_of(cells: Sequence[Measured]) -> Measured:
    """Mean over figures of the same lists, list by list."""
    parts = zip(*(cell.parts for cell in cells), strict=True)
    return Measured(tuple((np.mean([values for values, _ in part], axis=0), part[0][1]) for part in parts))


STUDY = Study(
    variants,
    rows,
    sentence,
    tuple(map(final, RERANKERS)),
    needs=tuple(map(rewarded_by, RERANKERS)),
)
