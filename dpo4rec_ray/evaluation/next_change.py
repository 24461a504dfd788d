"""The one change to a recipe that is worth trying first, for what `advice.py` says in words."""

from __future__ import annotations

from collections.abc import Callable

from dpo4rec_ray.config import Config
from dpo4rec_ray.evaluation.advice import COLLAPSE, CONFIRM, HARMS, NOISE, TEST, UNREAD
from dpo4rec_ray.rerankers import RERANKERS

MORE = 3  # times the users
OTHERS = 0.5  # share of the pairs with another user's text
MOST_TEST = 0.3  # share of test users
Changes = tuple[str, ...]  # section.key=value


def next_change(advised: str, config: Config, users_left: bool) -> Changes:
    """For a name of ADVICE; empty where a change of the recipe is not what comes first.

    users_left: whether the data has users that data.max_users left out.
    """
    if not users_left:
        config = config.model_copy(update={"data": config.data.model_copy(update={"max_users": 0})})
    rule = RULES.get(advised)
    return rule(config) if rule else ()


def _more_users(config: Config) -> Changes:
    """Three times the users, where there are more."""
    if config.data.dataset == "sample":
        return (f"sample.num_users={MORE * config.sample.num_users}",)
    return (f"data.max_users={MORE * config.data.max_users}",) if config.data.max_users else ()


def _read(config: Config) -> Changes:
    if not config.run.max_rounds:  # no reward's reranker that could learn to read
        return _more_users(config)
    if "statistics" not in config.reward.reader and config.llm.source != "statistics":
        own = ', "llm"' * config.run.retrain_reward  # which trains on the LLM's texts
        return (f'reward.reader=["statistics"{own}]',)
    return _more_users(config) or (f"reward.reader_texts={2 * config.reward.reader_texts}",)


def _finer(config: Config) -> Changes:
    """Another metric before more draws: draws are not for logged lists or a cut in time."""
    if config.reward.metric != "log_likelihood":
        return ("reward.metric=log_likelihood",)
    redraws = config.reward.num_redraws
    return (f"reward.num_redraws={2 * redraws}",) if redraws else _more_users(config)


def _more_pairs(config: Config) -> Changes:
    if found := _more_users(config):
        return found
    plain = config.pair.rule == "best_vs_worst" and config.pair.num_rejected == 1
    if plain and config.generate.num_samples >= 6:
        return ("pair.rule=top_vs_bottom", "pair.pairs_per_user=3")
    return (f"policy.epochs={config.policy.epochs + 1}",)


def _reading(config: Config) -> Changes:
    """Pairs with other users' texts first: what measured best on real data (docs/results.md)."""
    if config.policy.objectives == ("dpo",) and config.pair.others_share < OTHERS:
        return (f"pair.others_share={OTHERS}",)
    return _more_users(config) if config.reward.personal else ("reward.personal=12",)


def _more_test_users(config: Config) -> Changes:
    if found := _more_users(config):
        return found
    if config.logged.file:  # the log says who is tested
        return ()
    share = min(MOST_TEST, 2 * config.data.test_frac)
    return (f"data.test_frac={share:g}",) if config.data.test_frac < MOST_TEST else ()


def _all_backbones(config: Config) -> Changes:
    names = ", ".join(f'"{name}"' for name in RERANKERS)
    return () if len(config.evaluated_backbones) > 1 else (f"evaluate.backbones=[{names}]",)


def _other_seed(config: Config) -> Changes:
    return (f"run.seed={config.run.seed + 1}",)


RULES: dict[str, Callable[[Config], Changes]] = {
    UNREAD: _read,
    NOISE: _finer,
    COLLAPSE: lambda config: (f"policy.lr={config.policy.lr / 3:.1g}",),
    "channel": _all_backbones,
    "DPO accuracy": _more_pairs,
    "held-out reward": _more_users,
    "reading gain in NDCG@5": _more_users,
    "reading gain": _reading,
    "style gain": _reading,
    TEST: _more_test_users,
    HARMS: _other_seed,
    CONFIRM: _other_seed,
}
