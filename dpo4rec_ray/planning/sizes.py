"""How many users, lists and tokens a recipe comes to, from what is known of its data before it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.data import DataSection
from dpo4rec_ray.core.candidates import knowledge_cut
from dpo4rec_ray.datasets.synthetic import MAX_EVENTS, MIN_EVENTS
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.artifacts import RunDir

# What the paper says of its data after the cores (arXiv 2410.05939, section IV-A): users, items, interactions.
# Key: data.dataset, data.user_core, data.item_core. ML-1M's interactions: its README.
PUBLISHED = {
    ("movielens", 0, 0): ("MovieLens-1M", 6_040, 3_416, 1_000_209),
    ("amazon2018", 60, 40): ("Amazon-Books", 11_906, 17_332, 1_406_582),
}
# Every size of MovieLens has the same recipe: the name of the unpacked folder tells them apart.
PUBLISHED_MOVIELENS = "ml-1m"
# Tokens of a prompt where no run says it: the question, and an event with its title and rating.
QUESTION_TOKENS, EVENT_TOKENS = 100, 20


@dataclass(frozen=True)
class Sizes:
    """Rows and tokens of a run.

    Attributes:
        users, items, interactions, lists: of the prepared data.
        train, valid, test: users of each split.
        prompt_tokens: of a prompt about a user, on average.
        text_tokens: of a text about a user, on average.
        pairs: training pairs of a round; heldout_pairs: of validation users.
        assumed: where each number comes from, in sentences.
    """

    users: int
    items: int
    interactions: int
    lists: int
    train: int
    valid: int
    test: int
    prompt_tokens: float
    text_tokens: float
    pairs: int
    heldout_pairs: int
    assumed: tuple[str, ...] = ()

    @property
    def lists_per_user(self) -> float:
        return self.lists / self.users


def sizes_of_run(config: Config, store: RunDir) -> Sizes:
    """As a run has them that is done, as far as it is: what it has not reached is reckoned from the recipe.

    Raises:
        UserError: its data is not prepared.
    """
    made = store.require("lists").stats
    found = _reckoned(
        config, made.get("rows_of_users", made["users"]), made["items"], made["events"], made["lists"]
    )
    made = {
        name: store.manifest(name, number)
        for name, number in (("generations", 1), ("knowledge", 0), ("pairs", 1))
    }
    texts = made["generations"] or made["knowledge"]
    if texts and texts.stats.get("tokens"):
        found = replace(
            found,
            prompt_tokens=texts.stats["prompt_tokens"] / texts.stats["users"],
            text_tokens=texts.stats["tokens"] / texts.stats["samples"],
        )
    if pairs := made["pairs"]:
        of_round = config.run.turns_per_round * pairs.stats["pairs"]
        found = replace(found, pairs=of_round, heldout_pairs=pairs.stats["heldout_pairs"])
    return replace(found, assumed=())


def sizes_of_recipe(config: Config, given: Mapping[str, int], like: tuple[Config, Sizes] | None) -> Sizes:
    """Of a recipe that has not run.

    Args:
        given: "users", "items", "interactions", "lists": what the user knows.
        like: a finished run, whose shares per user hold for this one, and whose counts do if it has the same data.

    Raises:
        UserError: the number of users is not known.
    """
    data, assumed = config.data, list[str]()
    published = _published(data)
    same_data = like is not None and _same_data(data, like[0].data)
    if data.dataset == "sample":
        users, items = config.sample.num_users, config.sample.num_items
        interactions = round(users * (MIN_EVENTS + MAX_EVENTS) / 2)
        assumed.append(
            f"users and items: sample.num_users and sample.num_items; {MIN_EVENTS} to {MAX_EVENTS} events each"
        )
    elif like is not None and same_data and not (published and _has_fewer_users(like[0].data, data)):
        users, items, interactions = like[1].users, like[1].items, like[1].interactions
        assumed.append("users, items, interactions: those of the run whose rates are used")
    elif published:
        name, users, items, interactions = published
        assumed.append(f"users, items, interactions: as published for {name}")
    elif "users" in given:
        users, items, interactions = given["users"], 10_000, 30 * given["users"]
        assumed.append("items and interactions, unless given: 10,000, and 30 per user")
    else:
        raise UserError(
            f"how many users data.dataset = {data.dataset!r} in data.raw_dir = {data.raw_dir!r} comes to is not known; "
            "say --users N (and --items, --interactions), or run --only prepare on it and name that run with --from-run"
        )
    for name, most in (("data.max_users", data.max_users), ("--users", given.get("users", 0))):
        if most and (most < users or name == "--users"):
            interactions, users = round(interactions * most / users), most
            assumed.append(f"users: {name}, with as many interactions each")
    items, interactions = given.get("items", items), given.get("interactions", interactions)
    if same_data and like is not None and data.max_history == like[0].data.max_history:
        lists = round(like[1].lists / like[1].interactions * interactions)
        assumed.append("lists: as many per interaction as in the run whose rates are used")
    else:
        lists = _lists(config, users, interactions)
        assumed.append(f"lists: one per {data.block_size} events behind the knowledge history")
    found = _reckoned(config, users, items, interactions, given.get("lists", lists))
    if like is None:
        assumed.append(
            f"a prompt: {QUESTION_TOKENS} tokens and {EVENT_TOKENS} per event; a text: generate.max_new_tokens; "
            "every training user has its pairs"
        )
        return replace(found, assumed=tuple(assumed))
    config_then, then = like
    assumed.append("tokens per prompt and text, and pairs per user: as in the run whose rates are used")
    history, history_then = (_history(*one) for one in ((config, found), (config_then, then)))
    if round(history) != round(history_then):
        assumed.append(f"a prompt grows with its events, {history_then:.0f} there and {history:.0f} here")
    return replace(
        found,
        prompt_tokens=then.prompt_tokens * history / history_then,
        text_tokens=min(then.text_tokens, config.generate.max_new_tokens),
        pairs=round(then.pairs * found.pairs / _train_pairs(config_then, then.train)),
        heldout_pairs=round(then.heldout_pairs * found.valid / max(1, then.valid)),
        assumed=tuple(assumed),
    )


def _published(data: DataSection) -> tuple[str, int, int, int] | None:
    """Name, users, items and interactions of the data, where the paper says them."""
    folder = _folder(data).rpartition("/")[2].lower()
    if data.dataset == "movielens" and folder not in ("", PUBLISHED_MOVIELENS):
        return None
    return PUBLISHED.get((data.dataset, data.user_core, data.item_core))


def _same_data(data: DataSection, then: DataSection) -> bool:
    """Whether a run read the same files and kept the same users of them; a recipe without a folder may mean the run's."""
    same = all(getattr(data, key) == getattr(then, key) for key in ("dataset", "user_core", "item_core"))
    return same and _folder(data) in ("", _folder(then))


def _folder(data: DataSection) -> str:
    return data.raw_dir.rstrip("/")


def _has_fewer_users(then: DataSection, data: DataSection) -> bool:
    """Whether a run drew fewer users (data.max_users) than are asked for: its counts are not those of the data."""
    return bool(then.max_users) and not 0 < data.max_users <= then.max_users


def _history(config: Config, sizes: Sizes) -> float:
    """Events that a prompt shows, on average."""
    return float(knowledge_cut(round(sizes.interactions / sizes.users), config.data.max_history))


def _lists(config: Config, users: int, interactions: int) -> int:
    """Candidate lists: a block of events each; the last block of a user may be short."""
    per_user = interactions / users
    left = per_user - float(knowledge_cut(round(per_user), config.data.max_history))
    size = config.data.block_size
    return round(users * (left / size + (size - 1) / (2 * size)))


def _train_pairs(config: Config, train: int) -> int:
    per_user = 1 if config.pair.rule == "best_vs_worst" else config.pair.pairs_per_user
    return round(train * config.generate.user_frac * per_user)


def _reckoned(config: Config, users: int, items: int, interactions: int, lists: int) -> Sizes:
    data = config.data
    test = round(users * data.test_frac)
    valid = round((users - test) * data.valid_frac)
    train = users - test - valid
    prompt = QUESTION_TOKENS + EVENT_TOKENS * float(
        knowledge_cut(round(interactions / users), data.max_history)
    )
    most = config.llm.max_model_len - config.generate.max_new_tokens
    heldout = min(valid, config.policy.max_heldout_users or valid)
    return Sizes(
        users=users, items=items, interactions=interactions, lists=lists, train=train, valid=valid, test=test,
        prompt_tokens=min(prompt, most), text_tokens=config.generate.max_new_tokens,
        pairs=_train_pairs(config, train), heldout_pairs=2 * heldout,
    )  # fmt: skip
