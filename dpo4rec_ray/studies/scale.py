"""Study "scale": three and ten times the users. Each run is judged by its own rerankers on its own users: nothing is paired."""

from __future__ import annotations

from collections.abc import Sequence

from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.evaluation.run_comparison import ComparedRun
from dpo4rec_ray.evaluation.systems import BACKBONE
from dpo4rec_ray.stages.evaluate import system_name
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.studies.measures import FIGURES, GAIN, READING, config_of, level, lists_of, own_gain
from dpo4rec_ray.studies.study_parts import NAME, RECIPE, Changes, Measured, Part, Row, SeedRuns, Study, said
from dpo4rec_ray.studies.variants import last_turn, seconds

TIMES = (3, 10)
ADDED, LEARNED = "test NDCG@5 that texts add", "test NDCG@5 that DPO adds"
USERS, COST = "users", "seconds of all stages"


def variants(config: Config) -> dict[str, Changes]:
    if config.data.dataset == "sample":
        key, users = "sample.num_users", config.sample.num_users
    elif config.data.max_users:
        key, users = "data.max_users", config.data.max_users
    else:
        raise UserError(
            "study scale: set data.max_users to a tenth of the users; the study takes 3 and 10 times as many"
        )
    return {f"{times} x": (f"{key}={times * users}",) for times in TIMES}


def rows(seeds: Sequence[SeedRuns]) -> list[Row]:
    found: list[Row] = []
    for name in (RECIPE, *seeds[0].variants):
        stores = [seed.run(name) for seed in seeds]
        gains = [own_gain(store) for store in stores]
        row: Row = {NAME: "1 x" if name == RECIPE else name}
        row[USERS] = sum(store.require("users").rows for store in stores) / len(stores)
        row |= {column: Measured(tuple(gain[column] for gain in gains)) for column in FIGURES}
        added, learned = zip(*(_tested(store) for store in stores), strict=True)
        row |= {ADDED: Measured(added), LEARNED: Measured(learned)}
        row[COST] = sum(seconds(config_of(store), store) for store in stores) / len(stores)
        found.append(row)
    return found


def _tested(store: RunDir) -> tuple[Part, Part]:
    """What the last round's texts add to the backbone and to the base LLM's texts, per test list."""
    run = ComparedRun.open(str(store.root))
    lists, backbone = lists_of(run), run.config.evaluated_backbones[0]
    names = [system_name(run.config, turn) for turn in (last_turn(store), 0)]
    (mine, users), (base, _), (plain, _) = (level(lists, backbone, name) for name in (*names, BACKBONE))
    return (mine - plain, users), (mine - base, users)


def sentence(rows: Sequence[Row]) -> str:
    told = "; ".join(
        f"{row[NAME]} ({said(row[USERS])} users) {said(row[LEARNED])} for {said(row[COST])} s" for row in rows
    )
    return f"Test NDCG@5 that DPO adds to the base LLM's texts, each on its own test users: {told}."


STUDY = Study(
    variants,
    rows,
    sentence,
    (GAIN, READING, LEARNED, ADDED),
    judged_by="each run's own reward rerankers on its own users",
)
