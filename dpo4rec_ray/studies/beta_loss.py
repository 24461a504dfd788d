"""Study "beta_loss": preference losses and betas, from the same pairs."""

from __future__ import annotations

from collections.abc import Sequence

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.preference import SMOOTHED
from dpo4rec_ray.studies.ablation import check_dpo
from dpo4rec_ray.studies.measures import AGAINST, GAIN, READING, Point, standard_rows
from dpo4rec_ray.studies.study_parts import NAME, RECIPE, Changes, Row, SeedRuns, Study, measured, said

LOSSES = ("sigmoid", "ipo", "hinge")
FACTORS = (0.3, 1.0, 3.0)  # of the recipe's beta


def variants(config: Config) -> dict[str, Changes]:
    check_dpo(config)
    own, found = config.dpo, dict[str, Changes]()
    for loss in dict.fromkeys((own.loss, *LOSSES)):
        plain = ("dpo.label_smoothing=0",) if own.label_smoothing and loss not in SMOOTHED else ()
        for factor in FACTORS:
            if (loss, factor) != (own.loss, 1.0):
                beta = f"{factor * own.beta:g}"
                found[f"{loss}, beta {beta}"] = (f"dpo.loss={loss}", f"dpo.beta={beta}", *plain)
    return found


def rows(seeds: Sequence[SeedRuns]) -> list[Row]:
    points = [Point(RECIPE), *(Point(name, run=name) for name in seeds[0].variants)]
    found = standard_rows(seeds, points)
    own = seeds[0].config.dpo
    found[0][NAME] = f"{own.loss}, beta {own.beta:g} ({RECIPE})"
    return found


def sentence(rows: Sequence[Row]) -> str:
    ordered = sorted(rows, key=lambda row: measured(row, GAIN).interval.mean)
    best, worst = ordered[-1], ordered[0]
    return (
        f"Of {len(rows)} settings, {best[NAME]} gains most held-out reward: {said(best[GAIN])}, against the recipe "
        f"{said(best[AGAINST])}; {worst[NAME]} least: {said(worst[GAIN])}. The best was chosen on the users that it is measured "
        "on, so its lead is partly luck."
    )


STUDY = Study(variants, rows, sentence, (GAIN, READING))
