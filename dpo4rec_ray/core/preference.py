"""Preference losses: DPO and its relatives, per pair, from log-ratios of policy and reference. Pure functions.

`Ratios` holds one chosen and K rejected completions per prompt. Losses that are defined for a pair are means over the
prompt's K pairs; `softmax` takes all K at once. beta is how strongly the reference holds the policy (IPO's tau).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Ratios:
    """log pi - log ref, summed over completion tokens (EOS included), of B prompts with up to K rejected each."""

    chosen: Tensor  # [B]
    rejected: Tensor  # [B, K]
    mask: Tensor  # [B, K] bool, False where a prompt has fewer rejected
    chosen_length: Tensor  # [B] tokens
    rejected_length: Tensor  # [B, K]

    @property
    def margin(self) -> Tensor:
        """[B, K] chosen minus rejected; 0.0 where there is no rejected text, because a NaN there would reach the gradient."""
        return (self.chosen[:, None] - self.rejected).masked_fill(~self.mask, 0.0)

    @property
    def margin_per_token(self) -> Tensor:
        """[B, K] the same, of means over tokens."""
        chosen = self.chosen / self.chosen_length.clamp(min=1)
        margin = chosen[:, None] - self.rejected / self.rejected_length.clamp(min=1)
        return margin.masked_fill(~self.mask, 0.0)


# (ratios, beta, label_smoothing) -> losses [B]
PreferenceLoss = Callable[[Ratios, float, float], Tensor]


def sigmoid(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """DPO (Rafailov et al., arXiv 2305.18290, eq. 7); with label smoothing e conservative DPO (Mitchell, 2023).

    -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m); ln 2 where policy equals reference.
    """
    return _mean(ratios, _smoothed(beta * ratios.margin, label_smoothing))


def robust(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al., arXiv 2403.00409): unbiased if a share e < 0.5 of the pairs is swapped.

    (-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e).
    """
    scaled = beta * ratios.margin
    kept, swapped = -F.logsigmoid(scaled), -F.logsigmoid(-scaled)
    losses = ((1 - label_smoothing) * kept - label_smoothing * swapped) / (1 - 2 * label_smoothing)
    return _mean(ratios, losses)


def ipo(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """IPO (Azar et al., arXiv 2310.12036, eq. 17) on sums over tokens: (m - 1 / (2 beta))^2."""
    return _mean(ratios, (ratios.margin - 1 / (2 * beta)) ** 2)


def ipo_norm(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """IPO on means over tokens: what TRL calls "ipo"."""
    return _mean(ratios, (ratios.margin_per_token - 1 / (2 * beta)) ** 2)


def hinge(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """max(0, 1 - beta m) (SLiC, Zhao et al., arXiv 2305.10425, as normalised by RSO, arXiv 2309.06657)."""
    return _mean(ratios, torch.relu(1 - beta * ratios.margin))


def sigmoid_norm(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """DPO on means over tokens: long completions weigh no more than short ones."""
    return _mean(ratios, _smoothed(beta * ratios.margin_per_token, label_smoothing))


def softmax(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """S-DPO (Chen et al., arXiv 2406.09215, eq. 10): -log sigmoid(-log sum_k exp(-beta m_k)); DPO for K = 1."""
    scaled = (-beta * ratios.margin).masked_fill(~ratios.mask, -torch.inf)
    return -F.logsigmoid(-scaled.logsumexp(dim=1))


def chosen_nll(policy_chosen: Tensor, chosen_length: Tensor) -> Tensor:
    """[B] -log pi(chosen | prompt) per token: the term that keeps chosen texts likely (RPO, arXiv 2404.19733, eq. 2)."""
    return -policy_chosen / chosen_length.clamp(min=1)


def _smoothed(scaled: Tensor, label_smoothing: float) -> Tensor:
    losses = -(1 - label_smoothing) * F.logsigmoid(scaled)
    return losses - label_smoothing * F.logsigmoid(-scaled) if label_smoothing else losses


def _mean(ratios: Ratios, losses: Tensor) -> Tensor:
    """[B, K] -> [B], the mean over each prompt's rejected texts."""
    return losses.masked_fill(~ratios.mask, 0.0).sum(dim=1) / ratios.mask.sum(dim=1).clamp(min=1)


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "ipo": ipo,
    "ipo_norm": ipo_norm,
    "hinge": hinge,
    "sigmoid_norm": sigmoid_norm,
    "softmax": softmax,
}
# These use label_smoothing, and are ln 2 for each pair where policy equals reference; the others ignore it.
SMOOTHED = ("sigmoid", "robust", "sigmoid_norm")
