"""Study "ablation": which part of the method the gain is due to, with two controls of the preference signal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.rewards import best_of_n
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.evaluation.reward_diagnosis import read_matrices
from dpo4rec_ray.store.user_rows import valid_users
from dpo4rec_ray.studies.measures import (
    AGAINST,
    GAIN,
    READING,
    STYLE,
    TEST,
    TEST_AGAINST,
    TEST_GAIN,
    Point,
    standard_rows,
)
from dpo4rec_ray.studies.study_parts import (
    NAME,
    RECIPE,
    Changes,
    Measured,
    Part,
    Row,
    SeedRuns,
    Study,
    by_name,
    measured,
    said,
)

RANDOM, SWAPPED = "random pairs", "swapped pairs"
TRAINED, CHOSEN = "no DPO: trained on the best of N", "no DPO: the best of N is chosen"
BASE_LLM, PLAIN = "no training: base LLM", "no knowledge"


def check_dpo(config: Config) -> None:
    """Raises UserError where the recipe does not train by DPO alone, in one turn."""
    if config.policy.objectives != ("dpo",):
        raise UserError(
            f"this study is about DPO, but policy.objective = {config.policy.objective!r}; set policy.objective=dpo"
        )


def variants(config: Config) -> dict[str, Changes]:
    check_dpo(config)
    own = ("pair.others_share=0",) if config.pair.others_share else ()
    one = ("pair.num_rejected=1",) if config.pair.num_rejected > 1 else ()
    found: dict[str, Changes] = {
        RANDOM: ("pair.rule=random", *own, *one),
        SWAPPED: ("pair.rule=worst_vs_best", *own, *one),
        TRAINED: ("policy.objective=best_of_n",),
    }
    if own:
        found["pairs of own texts alone"] = own
    if config.reward.num_redraws:
        found["no redraws"] = ("reward.num_redraws=0",)
    if config.reward.num_folds > 1:
        found["no cross-fit"] = ("reward.num_folds=1",)
    return found


def rows(seeds: Sequence[SeedRuns]) -> list[Row]:
    points = [
        Point(PLAIN, turn=None),
        Point(BASE_LLM, turn=0),
        Point(RECIPE),
        *(Point(name, run=name) for name in seeds[0].variants),
    ]
    found = standard_rows(seeds, points)
    return [*found, _chosen(seeds, measured(by_name(found)[RECIPE], GAIN))]


def _chosen(seeds: Sequence[SeedRuns], recipe: Measured) -> Row:
    """Best-of-N at inference: each validation user's best of the base LLM's N texts, chosen on one half of the user's lists and
    measured on the other, against their mean. It needs N texts and the reward, which a user without likes does not have.

    recipe: its gain per validation user, with which the choice is compared on the users that have both.
    """
    chosen: list[Part] = []
    against: list[Part] = []
    for seed, (trained, those) in zip(seeds, recipe.parts, strict=True):
        users, matrices = read_matrices(seed.recipe.read("metric_scores", 1))
        own = matrices[seed.config.reward.metric]
        held = np.isin(users, valid_users(seed.recipe))
        best = best_of_n(own["half_a"][held], own["half_b"][held])
        users = users[held][best.kept]
        chosen.append((best.gain, users))
        both, mine, theirs = np.intersect1d(users, those, return_indices=True)
        against.append((best.gain[mine] - trained[theirs], both))
    row: Row = {NAME: CHOSEN, GAIN: Measured(tuple(chosen)), AGAINST: Measured(tuple(against))}
    return row | dict.fromkeys((READING, STYLE, TEST, TEST_GAIN, TEST_AGAINST))


def sentence(rows: Sequence[Row]) -> str:
    named = by_name(rows)
    gains = {name: measured(named[name], GAIN) for name in (RECIPE, RANDOM, SWAPPED, CHOSEN)}
    recipe, random, swapped = (gains[name].interval for name in (RECIPE, RANDOM, SWAPPED))
    shown = recipe.low > 0 and not random.low > 0 and swapped.high < 0
    verdict = f"{'' if shown else 'this does not show that '}the held-out gain is the preference signal's"
    kept = (
        f"{recipe.mean / best.mean:.0%} of it"
        if (best := gains[CHOSEN].interval).low > 0
        else "no share that can be told"
    )
    test = {name: said(named[name][TEST_GAIN]) for name in (RECIPE, RANDOM, SWAPPED)}
    return (
        f"Held-out reward since the base LLM: the recipe {said(gains[RECIPE])}, random pairs {said(gains[RANDOM])}, swapped "
        f"pairs {said(gains[SWAPPED])}: {verdict}. Choosing the best of N texts by the reward gains {said(gains[CHOSEN])} on "
        f"the lists that did not choose; DPO keeps {kept} in every single text. Test users' NDCG@5, by rerankers that each run "
        f"trains on its own texts: the recipe {test[RECIPE]}, random pairs {test[RANDOM]}, swapped pairs {test[SWAPPED]}."
    )


STUDY = Study(variants, rows, sentence, (GAIN, READING, TEST_GAIN), needs=(RANDOM, SWAPPED))
