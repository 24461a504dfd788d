"""What the report shows of single users: history, prompt, texts with rewards, pairs, and what a reranker makes of the texts.

Validation users alone, who are held out from training, drawn at random and not for how they look. What is drawn is bounded by
MAX_USERS and MAX_CHARS, so a page stays small whatever the size of the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.report.reranked_lists import Json, of, reranked, titles_of
from dpo4rec_ray.storage.places import place
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.policies import base_llm_path
from dpo4rec_ray.store.user_rows import valid_users

MAX_USERS = 60
MAX_CHARS = 1_000_000  # of all users together, as JSON
MAX_TEXT = 6_000  # characters of a text or prompt


def browsed(config: Config, store: RunDir, last_round: int) -> list[Json]:
    """The users of the report, as its script reads them; empty where there are no validation users.

    last_round: the last turn that was trained.
    """
    everyone = valid_users(store)
    order = np.random.default_rng(seed_of(config.run.seed, "report")).permutation(len(everyone))
    ids = np.sort(everyone[order[:MAX_USERS]])
    if not len(ids):
        return []
    table = store.read("users", where=of("user_id", ids)).sort_by("user_id")
    rows = {row["user_id"]: row for row in table.to_pylist()}
    titles = titles_of(store, {item for row in rows.values() for item in row["history_item_ids"]})
    found = {
        user: {
            "id": row["raw_id"],
            "profile": row["profile"],
            "history": [
                [titles[item], rating]
                for item, rating in zip(row["history_item_ids"], row["history_ratings"], strict=True)
            ],
            "rounds": [],
        }
        for user, row in rows.items()
    }
    _add_texts(config, store, last_round, found)
    folds = {user: row["fold"] for user, row in rows.items()}
    for user, ranked in reranked(config, store, last_round, folds).items():
        found[user]["list"] = ranked
    return list(_fitting(found[user] for user in everyone[order[:MAX_USERS]].tolist()))


def _fitting(users: Iterator[Json]) -> Iterator[Json]:
    """As many as there is room for."""
    room = MAX_CHARS
    for user in users:
        room -= len(json.dumps(user))
        if room < 0:
            return
        yield user


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"


def _grouped(table: pa.Table) -> dict[int, list[Json]]:
    found: dict[int, list[Json]] = {}
    for row in table.to_pylist():
        found.setdefault(row["user_id"], []).append(row)
    return found


def _add_texts(config: Config, store: RunDir, last_round: int, users: dict[int, Json]) -> None:
    """The first text of each user and the prompt; of each round the sampled texts, its pairs, and the texts after it."""
    run = config.run
    for user, texts in _knowledge(store, 0, users).items():
        users[user]["first"] = texts[0]
    ends = [end for end in run.round_ends(last_round) if end]
    if not config.has_policy and run.num_rounds:
        ends = [1]  # sampled and scored, and nothing trained
    tokenizer = _tokenizer(config, store, last_round)
    for end in ends:
        first, trained = run.first_turn(end), end <= last_round
        sampled, pairs = _sampled(store, first, users), _pairs(store, first, users)
        after = _knowledge(store, end, users) if trained else {}
        rewards = _heldout_rewards(store, end, users) if trained else {}
        for user, row in users.items():
            own = pairs.get(user, [])
            others = [pair for pair in own if tokenizer and pair["rejected_user_id"] != user]
            row["rounds"].append(
                {
                    "round": run.round_of(end),
                    "texts": _marked(sampled.get(user, []), own),
                    "others": [
                        _cut(tokenizer.decode(ids)) for pair in others for ids in pair["rejected_token_ids"]
                    ],
                    "after": after.get(user, []),
                    "reward": rewards.get(user),
                }
            )
    if config.llm.source == "openai":
        _add_messages(config, store, users)
    elif ends and tokenizer:
        where = [("sample_id", "=", 0), *of("user_id", users)]
        table = store.read("generations", 1, where=where, columns=["user_id", "prompt_token_ids"])
        for row in table.to_pylist():
            prompt = tokenizer.decode(row["prompt_token_ids"], skip_special_tokens=False)
            users[row["user_id"]]["prompt"] = _cut(prompt)


def _sampled(store: RunDir, turn: int, users: Iterable[int]) -> dict[int, list[Json]]:
    """The texts of a turn with their rewards, None where a user has no list to measure it on."""
    columns = ["user_id", "sample_id", "text", "token_ids"]
    table = store.read("generations", turn, where=of("user_id", users), columns=columns)
    scores = store.read(
        "scores", turn, where=of("user_id", users), columns=["user_id", "sample_id", "reward"]
    )
    rewards = {(row["user_id"], row["sample_id"]): row["reward"] for row in scores.to_pylist()}
    found = _grouped(table.sort_by("sample_id"))
    for row in (row for rows in found.values() for row in rows):
        reward = rewards.get((row["user_id"], row["sample_id"]))
        row["reward"] = reward if reward is not None and math.isfinite(reward) else None
    return found


def _pairs(store: RunDir, turn: int, users: Iterable[int]) -> dict[int, list[Json]]:
    """The pairs of a turn; those that an earlier training left there are none of it."""
    policy = store.manifest("policy", turn)
    if store.manifest("pairs", turn) is None or (policy and policy.stats.get("objective", "dpo") != "dpo"):
        return {}
    return _grouped(store.read("pairs", turn, where=of("user_id", users)))


def _heldout_rewards(store: RunDir, turn: int, users: Iterable[int]) -> dict[int, list[float]]:
    """The mean reward of a user's texts before and after a round."""
    columns = ["user_id", "reward_before", "reward_after"]
    table = store.read("heldout", turn, where=of("user_id", users), columns=columns)
    return {row["user_id"]: [row["reward_before"], row["reward_after"]] for row in table.to_pylist()}


def _marked(samples: Sequence[Json], pairs: Sequence[Json]) -> list[Json]:
    """The texts, best first: text, reward, rank (equal rewards share one), and whether a pair has it as chosen or rejected."""
    chosen = {tuple(pair["chosen_token_ids"]) for pair in pairs}
    rejected = {tuple(ids) for pair in pairs for ids in pair["rejected_token_ids"]}
    rewards = [row["reward"] for row in samples if row["reward"] is not None]
    found: list[Json] = []
    for row in samples:
        ids, reward = tuple(row["token_ids"] or ()), row["reward"]
        mark = "chosen" if ids and ids in chosen else "rejected" if ids and ids in rejected else ""
        rank = None if reward is None else 1 + sum(other > reward for other in rewards)
        found.append({"text": _cut(row["text"]), "reward": reward, "rank": rank, "mark": mark})
    return sorted(found, key=lambda one: one["rank"] or len(found) + 1)


def _knowledge(store: RunDir, turn: int, users: dict[int, Json]) -> dict[int, list[str]]:
    """The texts of policy `turn`: of the users, the first one that rerankers read first."""
    where = [("subject", "=", "user"), *of("subject_id", users)]
    table = store.read("knowledge", turn, where=where, columns=["subject_id", "sample_id", "text"])
    found: dict[int, list[str]] = {}
    for row in table.sort_by("sample_id").to_pylist():
        found.setdefault(row["subject_id"], []).append(_cut(row["text"]))
    return found


def _tokenizer(config: Config, store: RunDir, turn: int) -> Any:
    """The tokenizer beside a policy's weights, or the base LLM's; None where neither is at hand."""
    if not config.has_policy or not config.run.num_rounds:
        return None
    from tokenizers import Tokenizer

    files = sorted(store.path("policy", turn).glob("*/tokenizer.json")) if turn else []
    for file in [*files, place(base_llm_path(config, store)) / "tokenizer.json"]:
        if file.is_file():
            return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    return None


def _add_messages(config: Config, store: RunDir, users: dict[int, Json]) -> None:
    """As prompts, the messages that an endpoint was sent."""
    from dpo4rec_ray.knowledge.catalogue_prompts import CataloguePrompts
    from dpo4rec_ray.knowledge.prompts import messages
    from dpo4rec_ray.texts.examples import draw_examples
    from dpo4rec_ray.texts.text_source import catalogue

    prompts = CataloguePrompts.of_recipe(config, catalogue(store), draw_examples(config, store))
    for row in store.read("users", where=of("user_id", users)).to_pylist():
        question = prompts.user(row["profile"], row["history_item_ids"], row["history_ratings"])
        sent = messages(prompts.asked(question, row["user_id"]))
        text = "\n\n".join(f"{one['role']}: {one['content']}" for one in sent)
        users[row["user_id"]]["prompt"] = _cut(text)
