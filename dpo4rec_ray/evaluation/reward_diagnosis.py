"""Is the reward worth following? Ties, agreement between metrics, and the carry-over, from a round's metric scores.

Carry-over (docs/method.md section 4): the best and the worst sample are chosen on a random half of a user's lists, and their
gap is measured on the other half. A reward whose gap does not carry over teaches nothing. Gaps in different units do not
compare, so every metric is also measured by one yardstick: NDCG@5 of the other half's lists as they were drawn. The shrunk
gap is what shrinkage (`core.rewards.shrink`) makes of the gap on the half where it was chosen: if the shrinkage is right,
all of the shrunk gap carries over.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.core.intervals import Interval, paired_bootstrap, ratio_bootstrap
from dpo4rec_ray.core.rewards import carried_share, carry_over, list_noise, rank_agreement, shrink, tie_rates
from dpo4rec_ray.rerankers.text_rewards import YARDSTICK

MEASURED = ("reward", "std_error", "num_lists", "half_a", "half_b")  # columns of metric_scores
Matrices = dict[str, dict[str, np.ndarray]]  # metric -> one of MEASURED -> [U, N]


def read_matrices(metric_scores: pa.Table) -> tuple[np.ndarray, Matrices]:
    """User ids [U] and each metric's rewards per user and sample [U, N]."""
    table = metric_scores.sort_by([("user_id", "ascending"), ("sample_id", "ascending")])
    users, counts = np.unique(table["user_id"].to_numpy(), return_counts=True)
    metrics = list(dict.fromkeys(metric_scores["metric"].slice(0, int(counts[0])).to_pylist()))
    found: Matrices = {}
    for metric in metrics:
        own = table.filter(pc.equal(table["metric"], metric))
        found[metric] = {
            name: own[name].to_numpy().astype(np.float64).reshape(len(users), -1) for name in MEASURED
        }
    return users, found


def reward_diagnosis(metric_scores: pa.Table, metric: str, held_out: np.ndarray) -> dict[str, Any]:
    """The stats of `score`'s manifest.

    Args:
        metric_scores: all rows of the users that count.
        metric: the one that pairs are made of, or the name of the personal reward; its main numbers are repeated at the top.
        held_out: ids of the validation users; their numbers are also given separately.
    """
    users, matrices = read_matrices(metric_scores)
    own = np.isin(users, held_out)
    metrics = {name: _of_metric(matrices, name, slice(None)) for name in matrices}
    first = metrics[metric]
    return {
        **{name: first[name] for name in _TOP},
        "metrics": metrics,
        "metrics of validation users": {name: _of_metric(matrices, name, own) for name in matrices},
        "agreement": {
            f"{a} ~ {b}": rank_agreement(matrices[a]["reward"], matrices[b]["reward"])
            for a, b in itertools.combinations(matrices, 2)
        },
    }


def personal_diagnosis(scores: pa.Table) -> dict[str, Any]:
    """What of the plain reward the personal reward keeps: means over users of Spearman correlations over their samples.

    scores: all rows of the users that count, with others_reward.
    """
    table = scores.sort_by([("user_id", "ascending"), ("sample_id", "ascending")])
    num_users = len(pc.unique(table["user_id"]))
    reward, plain, others = (
        table[name].to_numpy().astype(np.float64).reshape(num_users, -1)
        for name in ("reward", "plain_reward", "others_reward")
    )
    return {
        "agreement_with_plain": rank_agreement(reward, plain),
        "agreement_with_others": rank_agreement(reward, others),
        # how much of the plain reward is a manner that helps everybody
        "plain_with_others": rank_agreement(plain, others),
        "users_without_others": int((np.isnan(others) & ~np.isnan(plain)).any(axis=1).sum()),
    }


# The numbers of the metric that pairs are made of which stand at the top of the manifest.
_TOP = (
    *("mean_reward", "spread", "users_in_carry_over", "gap_in_sample", "gap_held_out", "gap_held_out_ci95"),
    *("carried", "rank_correlation", "best tied"),
)
# Unknown where no user has two lists with a positive: None, and for intervals [NaN, NaN].
_NEED_TWO_LISTS = (
    *("gap_in_sample", "gap_held_out", "gap_held_out_ci95", "carried", "carried_ci95", "shrunk_gap"),
    *("carried_of_shrunk", "carried_of_shrunk_ci95", "yardstick_gap", "yardstick_gap_ci95"),
    "rank_correlation",
)


def _of_metric(matrices: Matrices, metric: str, rows: Any) -> dict[str, Any]:
    own = {name: values[rows] for name, values in matrices[metric].items()}
    known = own["reward"][~np.isnan(own["reward"]).any(axis=1)]
    found = carry_over(own["half_a"], own["half_b"])
    stats: dict[str, Any] = {
        "mean_reward": float(known.mean()) if len(known) else float("nan"),
        "spread": float(known.std(axis=1).mean()) if len(known) else float("nan"),
        **{f"{name} tied": share for name, share in tie_rates(own["reward"])._asdict().items()},
        "users_in_carry_over": len(found.kept),
    }
    if not len(found.kept):
        nothing = [float("nan")] * 2
        return stats | {name: nothing if name.endswith("ci95") else None for name in _NEED_TWO_LISTS}
    users = np.arange(len(found.kept))
    num_lists = own["num_lists"][:, 0]
    noise = list_noise(own["std_error"][:, 0], num_lists)
    with np.errstate(divide="ignore"):  # a half without lists has no reward
        in_a = shrink(own["half_a"], noise / np.sqrt((num_lists + 1) // 2))[0]
        in_b = shrink(own["half_b"], noise / np.sqrt(num_lists // 2))[0]
    shrunk = carry_over(in_a, in_b).gap_in_sample
    measure = {name: values[rows] for name, values in matrices[YARDSTICK].items()}
    on_yardstick = carry_over(own["half_a"], own["half_b"], measure["half_a"], measure["half_b"])
    yardstick = paired_bootstrap(on_yardstick.gap_held_out, np.arange(len(on_yardstick.kept)))
    return stats | {
        "gap_in_sample": float(found.gap_in_sample.mean()),
        **_with_interval("gap_held_out", paired_bootstrap(found.gap_held_out, users)),
        **_with_interval("carried", carried_share(found)),
        "shrunk_gap": float(shrunk.mean()),
        **_with_interval("carried_of_shrunk", ratio_bootstrap(found.gap_held_out, shrunk, users)),
        **_with_interval("yardstick_gap", yardstick),
        "rank_correlation": float(found.rank_correlation.mean()),
    }


def _with_interval(name: str, found: Interval) -> dict[str, Any]:
    return {name: found.mean, f"{name}_ci95": [found.low, found.high]}
