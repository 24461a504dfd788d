"""Study "n_samples": what N texts per user are worth, from nested subsets of one generation, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.pipeline import made
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.studies.ablation import BASE_LLM, check_dpo
from dpo4rec_ray.studies.measures import GAIN, TEST_AGAINST, Point, standard_rows
from dpo4rec_ray.studies.study_parts import NAME, RECIPE, Changes, Row, SeedRuns, Study, measured, said
from dpo4rec_ray.studies.variants import last_turn

COST = "{} of texts, rewards and training"


def variants(config: Config) -> dict[str, Changes]:
    check_dpo(config)
    most = config.pair.first_samples or config.generate.num_samples
    if most < 3:
        raise UserError(
            f"study n_samples: the recipe makes pairs of {most} texts per user, and a pair takes two; set more"
        )
    return {f"N = {count}": (f"pair.first_samples={count}",) for count in counts(most)}


def counts(most: int) -> list[int]:
    """2, 4, 8, ... below N. One text makes no pair, so N = 1 is the base LLM; all N are the recipe."""
    found = [2]
    while found[-1] * 2 < most:
        found.append(found[-1] * 2)
    return found


def rows(seeds: Sequence[SeedRuns]) -> list[Row]:
    most = seeds[0].config.pair.first_samples or seeds[0].config.generate.num_samples
    names = {
        BASE_LLM: 1,
        **{name: int(name.removeprefix("N = ")) for name in seeds[0].variants},
        RECIPE: most,
    }
    points = [Point(BASE_LLM, turn=0), *(Point(name, run=name) for name in seeds[0].variants), Point(RECIPE)]
    found = standard_rows(seeds, points)
    for row in found:
        name = str(row[NAME])
        paid = [
            0.0 if name == BASE_LLM else device_seconds(seed.config, seed.run(name), names[name])
            for seed in seeds
        ]
        row[cost_column(seeds[0].config)] = sum(paid) / len(paid)
        row[NAME] = f"N = {names[name]}"
    return found


def cost_column(config: Config) -> str:
    return COST.format("GPU seconds" if config.generate.gpus_per_engine else "seconds")


def device_seconds(config: Config, store: RunDir, count: int) -> float:
    """Seconds, times GPUs where there are any, of N = count: training as it was, texts and rewards as their share of all N.

    The share is reckoned: fewer texts share their prompt's pass with fewer others, which is a small part.
    """
    engines = config.generate.num_engines * config.generate.gpus_per_engine or 1
    workers = config.policy.num_workers * config.policy.gpus_per_worker or 1
    scorers = config.reward.num_scorers * config.reward.gpus_per_worker or 1
    share = count / config.generate.num_samples
    weights = {"generate": engines * share, "score": scorers * share, "dpo": workers}
    turns = range(1, last_turn(store) + 1)
    found = [(weight, made(store, name, turn)) for name, weight in weights.items() for turn in turns]
    return sum(weight * manifest.seconds for weight, manifest in found if manifest)


def sentence(rows: Sequence[Row]) -> str:
    last, others = rows[-1], rows[1:-1]
    gain = measured(last, GAIN).interval

    def share(row: Row) -> str:  # of a gain that there is
        return f", {measured(row, GAIN).interval.mean / gain.mean:.0%} of it" if gain.low > 0 else ""

    shares = "; ".join(f"{row[NAME]} {said(row[GAIN])}{share(row)}" for row in others)
    return f"{last[NAME]} gains {said(last[GAIN])} held-out reward; fewer texts of the same generation: {shares}."


STUDY = Study(variants, rows, sentence, (GAIN, TEST_AGAINST))
