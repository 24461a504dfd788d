"""Whether texts tell a reranker anything: what they add to the likelihood of the liked items, in standard errors.

Beyond the paper. A ranking metric of a hundred lists is a poor witness: it moves only where two candidates change places. The
likelihood moves with every score. On Amazon Gift Cards (91 validation lists, 12 fits, 40 dealings of other users' texts each)
the metric's gain passes 1.645 standard errors with 28 of 480 random texts and with 8 of 12 fits of counted ones, the
likelihood's with 3 of 480 and 10 of 12 (docs/results.md).
"""

from __future__ import annotations

import numpy as np

from dpo4rec_ray.core.intervals import clustered_std_error
from dpo4rec_ray.core.rewards import Array, FloatArray, log_likelihood_reward

# A reranker that ranks well is often too sure of itself; without a temperature whatever flattens its scores would seem to help.
TEMPERATURES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
# Shares of what the texts add. The strength that ranks best is often more than the likelihood bears.
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def evidence_of_texts(
    without: Array, with_texts: Array, labels: Array, mask: Array, user_ids: Array
) -> float:
    """Mean gain in the lists' log-likelihood over its standard error, users as clusters.

    The scores without texts get the temperature that suits them best; of what the texts add, the share that is likeliest counts.

    Args:
        without, with_texts, labels, mask: [B, L]; scores of the same lists, with NaN or anything where mask is False.
        user_ids: [B].

    Returns:
        0 if no share of what they add is likelier than nothing, or no list has a positive.
    """
    informative = ((labels > 0) & mask).any(axis=1)
    if not informative.any():
        return 0.0
    labels, mask, user_ids = labels[informative], mask[informative], user_ids[informative]
    base = np.where(mask, without[informative], 0.0)
    added = np.where(mask, with_texts[informative], 0.0) - base

    def likelihood(scores: FloatArray) -> FloatArray:
        return log_likelihood_reward(scores, labels, mask)

    temperature = max(TEMPERATURES, key=lambda one: float(likelihood(base / one).mean()))
    before = likelihood(base / temperature)
    gains = [likelihood((base + share * added) / temperature) - before for share in STRENGTHS]
    best = max(gains, key=lambda gain: float(gain.mean()))
    error = clustered_std_error(best, user_ids)
    return float(best.mean()) / error if best.mean() > 0 and error > 0 else 0.0
