"""A user's good and bad texts become preference pairs; users without a pair are counted by reason.

Beside pairs of a user's own texts there are pairs whose rejected text is another user's best (core/other_users.py). Validation
users get pairs of both kinds: they are never trained on and measure the accuracy of DPO.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.core.other_users import draw_others, taste_vectors
from dpo4rec_ray.core.pairing import PAIRINGS, Drop, Kind, Limits, Made, worst_samples
from dpo4rec_ray.core.rewards import Shrinkage, fit_shrinkage, list_noise
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.storage.parquet import read_files, read_parquet
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.store.reading import read_vectors
from dpo4rec_ray.store.schemas import SCHEMAS
from dpo4rec_ray.store.user_rows import held_out, pooled_parts
from dpo4rec_ray.train.scored_texts import unread_users

SPLITS = ("train", "valid")
# Users of a split whose best texts are held in memory, to be rejected under other users' prompts.
MAX_CANDIDATES = 4096
_ORDER = [("user_id", "ascending"), ("sample_id", "ascending")]
PairRow = dict[str, Any]  # a row of the artifact `pairs`


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `pairs` of the round, part by part: all samples of a user are in one part."""
    section = config.pair
    store.start("pairs", round_id)
    table = store.read("users", split=SPLITS, columns=["user_id", "split"]).sort_by("user_id")
    users, is_valid = _ids(table), held_out(table)
    of_valid = [("user_id", "in", pa.array(users[is_valid]))]
    sampled = np.unique(_ids(store.read("scores", round_id, where=of_valid, columns=["user_id"])))
    is_unread = np.isin(users, unread_users(config, sampled))
    judged = _Judged(config, store, round_id)
    # Held-out users always have a pair with another user's text: it measures whether DPO teaches reading.
    others = {
        split: OtherTexts(config, store, round_id, users[is_valid == (split == "valid")])
        for split in (SPLITS if section.others_share else ("valid",))
    }
    kept = {split: Counter[str]() for split in SPLITS}
    dropped = {split: Counter[str]() for split in SPLITS}
    fewer = Counter[str]()
    rows_in = rows_out = 0
    files = zip(store.files("generations", round_id), store.files("scores", round_id), strict=True)
    for part, (generation_file, score_file) in enumerate(files):
        samples, scores = (
            read_parquet(file, filters=_read_samples(config) or None).sort_by(_ORDER)
            for file in (generation_file, score_file)
        )
        if not samples["user_id"].equals(scores["user_id"]):
            raise ValueError(f"{score_file} and {generation_file} hold different users")
        rows_in += len(samples)
        scores = scores.append_column("judged", pa.array(judged.rewards(scores)))
        rows: list[PairRow] = []
        found = np.unique(_ids(samples), return_index=True, return_counts=True)
        places = _places(users, found[0])
        columns = (*found, is_valid[places], is_unread[places])
        for user, start, count, valid, unread in zip(*map(np.ndarray.tolist, columns), strict=True):
            split = SPLITS[valid]
            if unread:
                continue
            own = _Samples(config, user, samples.slice(start, count), scores.slice(start, count), judged)
            if not own.made.pairs:
                assert own.made.short is not None
                dropped[split][own.made.short.value] += 1
                continue
            if own.made.short and split == "train":
                fewer[own.made.short.value] += 1
            mine = own.rows(others.get(split), held_out=split == "valid")
            rows += [
                {"round": round_id, "user_id": user, "pair_id": place, "split": split, **row}
                for place, row in enumerate(mine)
            ]
            kept[split].update(row["kind"] for row in mine)
        rows_out += len(rows)
        store.write("pairs", pa.Table.from_pylist(rows, SCHEMAS["pairs"]), round_id, part)
    reasons = dict(dropped["train"])
    if not kept["train"]:
        raise UserError(
            f"{config.run.called(round_id)}: no training user gave a pair ({reasons}); "
            'use reward.metric = "log_likelihood", more reward.num_redraws, or a lower pair.min_margin'
        )
    say(
        f"  pairs: {_counted(kept['train'])} training, {_counted(kept['valid'])} held out; "
        f"users without a pair: {reasons or 'none'}"
        + (f", with fewer than asked: {dict(fewer)}" if fewer else "")
    )
    earlier = _earlier_pairs(store, round_id) if config.run.keep_pairs else 0
    failed = store.failed("generations", round_id)
    without_texts = is_valid[_places(users, failed["subject_id"].to_numpy())].tolist()
    for valid, reason in zip(without_texts, failed["reason"].to_pylist(), strict=True):
        dropped[SPLITS[valid]][reason] += 1
    stats = {
        "earlier_pairs": earlier,
        "pairs": kept["train"].total(),
        "pairs_by_kind": dict(kept["train"]),
        "heldout_pairs": kept["valid"].total(),
        "heldout_pairs_by_kind": dict(kept["valid"]),
        "dropped": dict(dropped["train"]),
        "dropped_heldout": dict(dropped["valid"]),
        "fewer_pairs": dict(fewer),
    }
    return Outcome(rows_in=rows_in, rows_out=rows_out + earlier, stats=stats)


def _earlier_pairs(store: RunDir, round_id: int) -> int:
    """Put the training pairs of the rounds before beside this one's, in parts of their own. Returns how many there are."""
    if round_id == 1:
        return 0
    next_part = len(store.files("generations", round_id))
    count = 0
    for place, file in enumerate(store.files("pairs", round_id - 1)):
        pairs = read_parquet(file, filters=[("split", "=", "train")])
        store.write("pairs", pairs, round_id, next_part + place)
        count += len(pairs)
    say(f"  pairs: {count} training pairs of earlier rounds are kept beside them")
    return count


def _ids(table: pa.Table) -> np.ndarray:
    return table["user_id"].to_numpy()


def _places(users: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Where each of `ids` [n] is in `users`, which are sorted: int [n]. Somebody else, such as a test user, is an error."""
    places = np.searchsorted(users, ids)
    if (strange := users.take(places, mode="clip") != ids).any():
        raise ValueError(f"user {ids[strange][0]} has texts and is of none of the splits {SPLITS}")
    return places


def _read_samples(config: Config) -> list[tuple[str, str, int]]:
    """The condition on samples that pairs are made of (pair.first_samples)."""
    first = config.pair.first_samples
    return [("sample_id", "<", first)] if first else []


def _counted(kinds: Counter[str]) -> str:
    """All pairs, and how many of them reject another user's text."""
    other = kinds[Kind.OTHER]
    return f"{kinds.total()}" + (f" ({other} against another user's text)" if other else "")


class _Samples:
    """The N samples of one user, and the pairs of them."""

    def __init__(self, config: Config, user: int, samples: pa.Table, scores: pa.Table, judged: _Judged):
        self._config, self._user, self._samples = config, user, samples
        self._rewards = scores["judged"].to_numpy()
        self._completions = samples["token_ids"].to_pylist()
        self._compared = compared(samples)
        self._limits = judged.limits(user, int(scores["num_lists"][0].as_py()))
        self.made: Made = PAIRINGS[config.pair.rule](self._rewards, self._compared, self._limits)
        if self.made.short is Drop.NO_LISTS and not np.isnan(scores["plain_reward"].to_numpy()).any():
            self.made = Made([], Drop.NO_OTHERS)

    def rows(self, others: OtherTexts | None, *, held_out: bool) -> list[PairRow]:
        """Pairs of own texts, and `others_share` of the pairs with other users' texts in the place of the least clear ones.

        A held-out user has every own pair and one with another user's text.
        """
        pairs, share = self.made.pairs, self._config.pair.others_share
        rng = np.random.default_rng([seed_of(self._config.run.seed, "other texts"), self._user])
        # Rounded up as often as the rest says, so that the share holds over all users.
        num_others = 1 if held_out else int(share * len(pairs) + rng.random())
        rejected = others.draw(self._user, self._compared, num_others, rng) if others and num_others else []
        num_own = len(pairs) if held_out else len(pairs) - len(rejected)
        best = pairs[0][0]
        return [
            *(self._row(chosen, self._of_own(chosen, worst)) for chosen, worst in pairs[:num_own]),
            *(self._row(best, other) for other in rejected),
        ]

    def _row(self, chosen: int, rejected: PairRow) -> PairRow:
        return {
            "prompt_token_ids": self._samples["prompt_token_ids"][0].as_py(),
            "chosen_token_ids": self._completions[chosen],
            "chosen_reward": float(self._rewards[chosen]),
            **rejected,
        }

    def _of_own(self, chosen: int, worst: int) -> PairRow:
        count = self._config.pair.num_rejected
        places = worst_samples(self._rewards, self._compared, (chosen, worst), count, self._limits)
        return {
            "kind": Kind.OWN.value,
            "rejected_user_id": self._user,
            "rejected_token_ids": [self._completions[place] for place in places],
            "rejected_reward": [float(self._rewards[place]) for place in places],
        }


def compared(samples: pa.Table) -> list[Any]:
    """By what texts are the same: token ids, or the texts where there are none (llm.source is not "vllm")."""
    completions = samples["token_ids"].to_pylist()
    return completions if any(completions) else samples["text"].to_pylist()


class OtherTexts:
    """The best texts of up to MAX_CANDIDATES users of a split, and how alike the users are to others."""

    def __init__(self, config: Config, store: RunDir, round_id: int, users: np.ndarray):
        rng = np.random.default_rng([seed_of(config.run.seed, "candidates"), round_id])
        drawn = pa.array(np.sort(rng.permutation(users)[:MAX_CANDIDATES]), pa.int64())
        where = [*_read_samples(config), ("user_id", "in", drawn)]
        scores = store.read("scores", round_id, where=where, columns=["user_id", "sample_id", "reward"])
        best = _best_samples(scores.sort_by(_ORDER))
        texts = store.read(
            "generations",
            round_id,
            where=[("user_id", "in", pa.array(list(best), pa.int64()))],
            columns=["user_id", "sample_id", "token_ids", "text"],
        ).sort_by(_ORDER)
        chosen = [
            best[user] == sample
            for user, sample in zip(texts["user_id"].to_pylist(), texts["sample_id"].to_pylist(), strict=True)
        ]
        texts = texts.filter(pa.array(chosen, pa.bool_()))
        self._users = texts["user_id"].to_numpy()
        self._compared, self._token_ids = compared(texts), texts["token_ids"].to_pylist()
        self._hardness = config.pair.others_hardness
        self._tastes: dict[int, np.ndarray] = {}
        if self._hardness:
            self._tastes = _tastes(config, store, users)
            self._vectors = np.stack([self._tastes[user] for user in self._users.tolist()])

    def draw(self, user: int, own: list[Any], count: int, rng: np.random.Generator) -> list[PairRow]:
        """The rejected side of up to `count` pairs. own: the user's texts as `compared` has them; none of them is drawn."""
        similarity = self._vectors @ self._tastes[user] if self._hardness else np.zeros(len(self._users))
        similarity = np.where(self._users == user, -np.inf, similarity)
        return [
            {
                "kind": Kind.OTHER.value,
                "rejected_user_id": int(self._users[place]),
                "rejected_token_ids": [self._token_ids[place]],
                "rejected_reward": [float("nan")],
            }
            for place in draw_others(similarity, count, self._hardness, rng).tolist()
            if self._compared[place] not in own
        ]


def _best_samples(scores: pa.Table) -> dict[int, int]:
    """Each user's sample of the highest reward; users whose rewards are unknown or all the same have none."""
    users, starts = np.unique(scores["user_id"].to_numpy(), return_index=True)
    best = {}
    for user, own in zip(users.tolist(), np.split(scores["reward"].to_numpy(), starts[1:]), strict=True):
        if own.max() > own.min():  # False with a NaN
            best[user] = int(own.argmax())
    return best


def _tastes(config: Config, store: RunDir, users: np.ndarray) -> dict[int, np.ndarray]:
    """Unit vectors of what the users like, by what their prompts show."""
    columns = ["user_id", "history_item_ids", "history_ratings"]
    table = store.read("users", split=SPLITS, columns=columns)
    table = table.filter(pc.is_in(table["user_id"], pa.array(users, pa.int64())))
    histories = [np.asarray(items, np.int64) for items in table["history_item_ids"].to_pylist()]
    liked = [
        np.asarray(ratings) >= config.data.positive_rating for ratings in table["history_ratings"].to_pylist()
    ]
    vectors = taste_vectors(histories, liked, read_vectors(store, 0, "item")[1])
    return dict(zip(table["user_id"].to_pylist(), vectors, strict=True))


class _Judged:
    """Rewards as pairs are made from them, and what luck alone makes of a difference: both are pooled over users."""

    def __init__(self, config: Config, store: RunDir, round_id: int):
        self._section, self._seed = config.pair, seed_of(config.run.seed, "pair", round_id)
        self._noise, self._shrinkage = 0.0, None
        if not (config.pair.shrinkage or config.pair.min_std_errors):
            return
        called = config.run.called(round_id)
        num_users = store.require("scores", round_id).rows // config.generate.num_samples
        parts = pooled_parts(store.files("scores", round_id), num_users)
        scores = read_files(parts, filters=_read_samples(config) or None).sort_by(_ORDER)
        starts = np.unique(_ids(scores), return_index=True)[1]
        num_lists = scores["num_lists"].to_numpy()[starts]
        self._noise = list_noise(scores["std_error"].to_numpy()[starts], num_lists)
        if config.pair.min_std_errors and np.isnan(self._noise):
            raise UserError(
                f"{called}: no user has a standard error of its rewards (that takes two lists with a positive): worth and "
                "luck cannot be separated; set pair.min_std_errors = 0"
            )
        if config.pair.shrinkage:
            rewards = scores["reward"].to_numpy().reshape(len(starts), -1)  # every user has N samples
            self._shrinkage = _shrinkage(rewards, _errors(self._noise, num_lists), called)

    def rewards(self, scores: pa.Table) -> np.ndarray:
        """[rows] of `scores`, which has all samples of some users, user by user."""
        rewards = scores["reward"].to_numpy()
        if self._shrinkage is None:
            return rewards
        starts = np.unique(_ids(scores), return_index=True)[1]
        errors = _errors(self._noise, scores["num_lists"].to_numpy()[starts])
        return self._shrinkage(rewards.reshape(len(starts), -1), errors)[0].ravel()

    def limits(self, user: int, num_lists: int) -> Limits:
        """For a user, who has so many lists. The difference of two samples has the standard error sqrt(2) times one sample's."""
        section = self._section
        error = self._noise * np.sqrt(2 / max(1, num_lists))
        return Limits(
            section.pairs_per_user,
            section.min_margin,
            section.min_std_errors * error,
            seed_of(self._seed, user),
        )


def _errors(noise: float, num_lists: np.ndarray) -> np.ndarray:
    """Standard error of a sample's reward over so many lists. A user without lists has no reward either."""
    with np.errstate(divide="ignore"):
        return noise / np.sqrt(num_lists)


def _shrinkage(rewards: np.ndarray, errors: np.ndarray, called: str) -> Shrinkage:
    found = fit_shrinkage(rewards, errors)
    factors = found(rewards, errors)[1]
    if not np.nansum(factors):
        raise UserError(
            f"{called}: the rewards differ no more than luck alone explains, so shrinkage leaves no pair; use "
            'reward.metric = "log_likelihood", more reward.num_redraws or more users, or set pair.shrinkage = false'
        )
    say(f"  shrinkage: rewards keep {np.nanmean(factors):.0%} of their distance from the user's mean")
    return found
