"""Group relative policy optimisation (GRPO, arXiv 2402.03300): advantages within a user's texts, and the loss of their tokens.

A user's N scored texts are a group. All functions take one micro-batch flat: M completion tokens of S texts of B groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Added to a standard deviation, as TRL does: rewards that differ by less than this are not blown up.
SPREAD_FLOOR = 1e-4


def advantages(rewards: np.ndarray, scale: str) -> np.ndarray | None:
    """A group's rewards -> how much better each text is than the group's mean; None where there is nothing to learn.

    Args:
        rewards: [N].
        scale: "std" divides by the group's standard deviation (N - 1), as the paper does: every group weighs the same. "none"
            does not (Dr. GRPO, arXiv 2503.20783): groups whose texts differ much weigh more.

    Returns:
        [N] float64 of sum 0; None for a single text, an unknown reward (NaN), or rewards that are all the same.
    """
    if len(rewards) < 2 or not np.isfinite(rewards).all() or rewards.max() == rewards.min():
        return None
    centred = rewards.astype(np.float64) - rewards.mean(dtype=np.float64)
    return centred if scale == "none" else centred / (centred.std(ddof=1) + SPREAD_FLOOR)


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's loss per token, -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and where the clipped side is the smaller one.

    log_ratio: [M] log pi(token) - log pi_old(token); advantage: [M] of the token's text -> [M] and [M] bool.
    """
    ratio = log_ratio.exp()
    plain = ratio * advantage
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    return -torch.minimum(plain, clipped), clipped < plain


def divergence(log_ratio: Tensor, to_reference: Tensor) -> Tensor:
    """An estimate of KL(pi || reference) per token, from tokens that pi_old drew; never negative.

    Schulman's k3, exp(d) - d - 1 with d = log(reference / pi), times the ratio r = pi / pi_old: without r it would be right for
    tokens that pi draws, and its gradient that of another divergence (DeepSeek-V3.2, arXiv 2512.02556; TRL's
    use_bias_correction_kl).

    log_ratio: [M] log pi(token) - log pi_old(token); to_reference: [M] log reference(token) - log pi(token).
    """
    # r (exp(d) - d - 1) without the product of a tiny and a huge number, and exact near 0.
    return torch.expm1(log_ratio + to_reference) - torch.expm1(log_ratio) - log_ratio.exp() * to_reference


def truncated_importance(log_weight: Tensor, cap: float) -> Tensor:
    """[M] log of trainer's over engine's probability of a token under the same weights -> its weight, at most `cap`.

    An engine computes with other kernels than the trainer, so its tokens come from a slightly other distribution. The weight
    makes up for that, and the cap keeps its variance in bounds (truncated importance sampling, Yao et al., 2025).
    """
    return log_weight.exp().clamp(max=cap)


@dataclass(frozen=True)
class Shape:
    """Which token belongs to which text, and which text to which group.

    texts: [M] text of each token, 0..S-1. groups: [S] group of each text, 0..B-1. lengths: [S] tokens per text.
    """

    texts: Tensor
    groups: Tensor
    lengths: Tensor

    def group_sizes(self) -> Tensor:
        """[B] texts per group."""
        return torch.bincount(self.groups)


def sequence_mean(shape: Shape, max_length: int) -> Tensor:
    """Mean over each text's tokens, then over the group's texts: GRPO as published. A short text's token weighs more."""
    return 1 / (shape.lengths * shape.group_sizes()[shape.groups])[shape.texts].double()


def token_mean(shape: Shape, max_length: int) -> Tensor:
    """Mean over all tokens of the group: each token weighs the same (DAPO, arXiv 2503.14476, which takes the whole batch)."""
    tokens = torch.bincount(shape.groups, shape.lengths.double())
    return 1 / tokens[shape.groups][shape.texts]


def constant_mean(shape: Shape, max_length: int) -> Tensor:
    """Sum over tokens by a constant, the longest text that may be written: free of length (Dr. GRPO, arXiv 2503.20783)."""
    return 1 / (shape.group_sizes()[shape.groups] * max_length)[shape.texts].double()


# shape, longest text in tokens -> weights [M] float64 of the tokens' losses in the sum over the batch's groups
TOKEN_WEIGHTS: dict[str, Callable[[Shape, int], Tensor]] = {
    "sequence": sequence_mean,
    "token": token_mean,
    "constant": constant_mean,
}


def sums_per_group(values: Tensor, weights: Tensor, shape: Shape) -> Tensor:
    """[M] values and weights -> [B] weighted sums, float64."""
    of_token = shape.groups[shape.texts]
    total = torch.zeros(int(shape.groups.max()) + 1, dtype=torch.float64, device=values.device)
    return total.index_add(0, of_token, values.double() * weights)
