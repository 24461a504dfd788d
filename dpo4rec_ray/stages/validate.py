"""Did the round help, and is what it taught about the users? From fresh samples of the validation users, before and after.

Before are texts of the policy that the round began with, after of the one that it ends with. All figures are means over all
N samples of a user, without any selection. Test users are not used. A round is kept if its reward is higher than that of the
best one before it and its reading is not clearly lower (`core.reading_gain.judge`); rounds stop when none is kept any more, and
the best round is the one that is served.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.recipe import RunSection
from dpo4rec_ray.core.intervals import signed
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.core.reading_gain import Heldout, Verdict, judge, peaked
from dpo4rec_ray.core.text_counts import variety
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.evaluation.heldout_texts import Figures, HeldoutMeasure, UserTexts, accuracy_stats, change_of
from dpo4rec_ray.evaluation.round_reasons import reasons
from dpo4rec_ray.knowledge.teacher import EVERY_FACET
from dpo4rec_ray.rerankers.text_rewards import YARDSTICK
from dpo4rec_ray.store import events
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.store.reading import sample_scorer, vectors_of
from dpo4rec_ray.store.schemas import HELDOUT_FIGURES
from dpo4rec_ray.store.user_rows import liked_items, valid_users
from dpo4rec_ray.texts.vectors import open_encoder
from dpo4rec_ray.workers.stage_workers import reward_tasks
from dpo4rec_ray.workers.tasks import in_worker

_SIDES = ("before", "after")


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `heldout` of the round."""
    store.start("heldout", round_id)
    table, stats = in_worker(_measure, config, store, round_id, needs=reward_tasks(config).needs)
    if config.run.round_of(round_id) > 1:
        stats["figures_since_base"] = _since_base(store.read("heldout", config.run.turns_per_round), table)
    verdict, choice = _choice(config.run, store, round_id, table)
    if not verdict.kept:
        policy, scores = (
            store.require(name, one).stats
            for name, one in (("policy", round_id), ("scores", config.run.first_turn(round_id)))
        )
        choice["choice"]["why"] = reasons(verdict, stats, policy, scores, config.policy.max_kl_per_token)
    stats |= choice
    store.write("heldout", table, round_id)
    choice = stats["choice"]
    against = config.run.round_of(choice["against"])
    events.note("round_accepted" if choice["kept"] else "round_rejected", against=against)
    for line in _lines(config.run, stats, len(table), round_id):
        say(f"  {line}")
    return Outcome(rows_in=stats["samples"], rows_out=len(table), stats=stats)


def _measure(config: Config, store: RunDir, round_id: int) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of `heldout` and their figures; in a process of its own."""
    measure = open_measure(config, store)
    began = time.monotonic()
    first = config.run.first_turn(round_id)
    sides = {"before": texts_before(config, store, first), "after": texts_after(store, round_id)}
    users, figures = measure.figures(sides)
    if not len(users):
        raise UserError(
            "no validation user has a reward both before and after; raise data.valid_frac, or see which users "
            "generate could not sample (the manifest of generations counts them)"
        )
    sides = {name: side.of(users) for name, side in sides.items()}
    truth = store.read("truth")
    tastes = dict(zip(truth["user_id"].to_pylist(), truth["tastes"].to_pylist(), strict=True))
    table = pa.table(
        {
            "round": np.full(len(users), round_id, np.int32),
            "user_id": users,
            **{
                f"{name}_{side}": figures[side][name].astype(np.float32)
                for name in HELDOUT_FIGURES
                for side in _SIDES
            },
        }
    )
    found = {name: change.as_dict() for name, change in change_of(*figures.values()).items()}
    stats: dict[str, Any] = {
        **{f"heldout_reward_{side}": found["reward"][side] for side in _SIDES},
        "heldout_reward_delta": found["reward"]["change"],
        "heldout_reward_delta_ci95": found["reward"]["change_ci95"],
        "samples": sum(len(side.texts) for side in sides.values()),
        "figures": found,
    }
    for name, side in sides.items():
        looks = variety(side.per_user())
        stats[f"distinct_texts_{name}"] = found["distinct_texts"][name]
        stats |= {f"distinct_overall_{name}": looks.distinct_overall, f"opening_{name}": looks.opening}
        if accuracy := accuracy_stats(side, tastes):
            every = accuracy[EVERY_FACET]
            stats |= {f"text_accuracy_{name}": every["accuracy"], f"text_chance_{name}": every["chance"]}
            stats[f"accuracy_by_facet_{name}"] = accuracy
    stats["work_s"] = round(time.monotonic() - began, 2)  # the rest of the stage is its start
    return table, stats


def _since_base(first: pa.Table, last: pa.Table) -> dict[str, Any]:
    """What the rounds up to this one changed, over the users that the first one has too."""
    users = np.intersect1d(first["user_id"].to_numpy(), last["user_id"].to_numpy())
    sides = {
        side: side_figures(table.filter(pc.is_in(table["user_id"], pa.array(users))), side)
        for side, table in (("before", first), ("after", last))
    }
    return {name: change.as_dict() for name, change in change_of(sides["before"], sides["after"]).items()}


def side_figures(heldout: pa.Table, side: str) -> Figures:
    """The figures of a table `heldout` before or after, user by user in the order of their ids."""
    table = heldout.sort_by("user_id")
    return {name: table[f"{name}_{side}"].to_numpy().astype(np.float64) for name in HELDOUT_FIGURES}


def open_measure(config: Config, store: RunDir) -> HeldoutMeasure:
    """What is known of the catalogue and of the validation users: their histories, and later likes from their own lists."""
    items = store.read("items", columns=["title", "attributes"])  # in item id order
    users = store.read("users", split="valid", columns=["user_id", "history_item_ids"])
    lists = store.read("lists", split="valid", columns=["user_id", "candidate_item_ids", "labels"])
    lists = lists.filter(pc.is_in(lists["user_id"], users["user_id"].combine_chunks()))
    return HeldoutMeasure(
        sample_scorer(config, store, [config.reward.metric, YARDSTICK]),
        items["title"].to_pylist(),
        items["attributes"].to_pylist(),
        dict(zip(users["user_id"].to_pylist(), users["history_item_ids"].to_pylist(), strict=True)),
        liked_items(lists),
        seed_of(config.run.seed, "others"),
    )


def texts_before(config: Config, store: RunDir, round_id: int) -> UserTexts:
    """The samples of `generations`. Their vectors are not kept, so they are encoded once more."""
    table = store.read("generations", round_id, columns=["user_id", "sample_id", "text"])
    table = table.filter(pc.is_in(table["user_id"], pa.array(valid_users(store))))
    table = table.sort_by([("user_id", "ascending"), ("sample_id", "ascending")])
    texts = table["text"].to_pylist()
    return UserTexts(table["user_id"].to_numpy(), texts, open_encoder(config.encoder).encode(texts))


def texts_after(store: RunDir, round_id: int) -> UserTexts:
    """The samples of `knowledge`. Users without all their texts have none before (generate leaves them out), nor after."""
    failed = store.failed("knowledge", round_id)["subject_id"].to_numpy()  # after round 0 there are no items
    valid = pa.array(np.setdiff1d(valid_users(store), failed))
    table = store.read("knowledge", round_id)
    table = table.filter(pc.and_(pc.equal(table["subject"], "user"), pc.is_in(table["subject_id"], valid)))
    table = table.sort_by([("subject_id", "ascending"), ("sample_id", "ascending")])
    return UserTexts(table["subject_id"].to_numpy(), table["text"].to_pylist(), vectors_of(table["vector"]))


def _choice(run: RunSection, store: RunDir, round_id: int, table: pa.Table) -> tuple[Verdict, dict[str, Any]]:
    """Whether the round is kept in place of the best one before it, and for the manifest that and the best round so far."""
    best = best_round(store, round_id - run.turns_per_round)
    first = table if run.round_of(round_id) == 1 else store.read("heldout", run.turns_per_round)
    before = _heldout(store.read("heldout", best), "after") if best else _heldout(first, "before")
    verdict = judge(_heldout(table, "after"), before)
    choice: dict[str, Any] = {"kept": verdict.kept, "against": best}
    for name in ("reward", "reading"):
        change = getattr(verdict, name)
        choice |= {name: change.mean, f"{name}_ci95": [change.low, change.high]}
    return verdict, {"choice": choice, "best_round": round_id if verdict.kept else best}


def _heldout(table: pa.Table, side: str) -> Heldout:
    table = table.sort_by("user_id")
    reward, others = (
        table[f"{name}_{side}"].to_numpy().astype(np.float64) for name in ("reward", "others_reward")
    )
    # A single user has no others: its reading is unknown on both sides, and decides nothing.
    return Heldout(table["user_id"].to_numpy(), reward, np.nan_to_num(reward - others))


def _lines(run: RunSection, stats: dict[str, Any], num_users: int, round_id: int) -> Iterator[str]:
    """What the terminal shows of a round."""
    found = stats["figures"]

    def moved(name: str) -> str:
        return f"{found[name]['before']:.3g} -> {found[name]['after']:.3g}"

    def change(name: str, of: dict[str, Any] | None = None) -> str:
        one = found[name] if of is None else {"change": of[name], "change_ci95": of[f"{name}_ci95"]}
        return signed(one["change"], one["change_ci95"])

    yield (
        f"held-out reward: {stats['heldout_reward_before']:.4f} -> {stats['heldout_reward_after']:.4f}, "
        f"difference {change('reward')} over {num_users} users"
    )
    if "reading" in found:  # not with a single user
        yield (
            f"reading gain {change('reading')}, in NDCG@5 {change('reading_ndcg')}; "
            f"style gain {change('others_reward')}, in NDCG@5 {change('others_ndcg')}"
        )
    if "fit_above" in found:
        yield f"what texts name fits later likes above average: {moved('fit_above')}, difference {change('fit_above')}"
    yield (
        f"per text: {moved('values')} attribute values, {moved('titles_history')} titles of the history, "
        f"{moved('titles_catalogue')} others of the catalogue, {moved('titles_invented')} invented; {moved('words')} words"
    )
    yield (
        f"distinct texts {moved('distinct_texts')} of a user's, {stats['distinct_overall_before']:.3g} -> "
        f"{stats['distinct_overall_after']:.3g} of all; most common opening {moved('common_opening')}"
    )
    choice = stats["choice"]
    yield (
        f"round {run.round_of(round_id)} {'kept' if choice['kept'] else 'not kept'}: against round "
        f"{run.round_of(choice['against'])} reward "
        f"{change('reward', choice)}, reading {change('reading', choice)}"
    )
    yield from (f"  why: {sentence}" for sentence in choice.get("why", []))


def rounds_have_peaked(run: RunSection, store: RunDir, round_id: int) -> str:
    """Why no round follows that of `round_id`; "" where one does.

    None of the last `run.patience` rounds was better than the best one before them; or, where nothing but this decides how many
    there are (run.num_rounds = "auto"), none was better beyond chance: half of all rounds that change nothing are better.
    """
    found = {one: store.manifest("heldout", one) for one in run.round_ends(round_id) if one}
    if any(manifest is None for manifest in found.values()):
        return ""
    if peaked(run.round_of(round_id), run.round_of(best_round(store, round_id)), run.patience):
        return "no longer better than the best round so far"
    if run.num_rounds == "auto" and len(found) >= run.patience:
        lately = [manifest.stats["choice"] for manifest in list(found.values())[-run.patience :] if manifest]
        if not any(map(_clearly_better, lately)):
            return "no better than the best round before it beyond chance"
    return ""


def _clearly_better(choice: dict[str, Any]) -> bool:
    low = choice["reward_ci95"][0]
    return choice["kept"] and low is not None and low > 0


def best_round(store: RunDir, last_round: int) -> int:
    """The best of the rounds up to this one, by its last turn, as `validate` chose it; 0 when none improved on the base LLM.

    Raises:
        UserError: an older version validated the round.
    """
    if not last_round:
        return 0
    stats = store.require("heldout", last_round).stats
    if "best_round" not in stats:
        raise UserError(
            f"{store.path('heldout', last_round)} was made before rounds were chosen by reading; run again with --from validate"
        )
    return int(stats["best_round"])
