"""Log-probabilities of completions for the language model, ranking losses for the rerankers.

Differs from the paper: `listwise_softmax` is the plain softmax cross-entropy. SetRank's ReLU form, as KAR's code has it, has
no gradient for logits <= 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(logits: Tensor, token_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """log p(token_t | tokens < t) at completion tokens, 0.0 elsewhere.

    logits: [B, T, V]; token_ids, completion_mask: [B, T] -> [B, T - 1]. Column t - 1 belongs to token t: the
    logits at t - 1 predict token t, so the first token has no prediction and its mask is ignored.
    Half-precision logits are converted to float32 first. Padding may hold any valid token id, on either side.
    """
    predictions = logits[:, :-1]
    predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    targets = token_ids[:, 1:]
    losses = F.cross_entropy(predictions.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    # masked_fill and not a product: padding may hold inf or NaN, and inf * 0 is NaN
    return -losses.masked_fill(~completion_mask[:, 1:].bool(), 0.0)


def sequence_logps(logits: Tensor, token_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """log p(completion | prompt): the sum over completion tokens (EOS included when the mask holds it).

    logits: [B, T, V]; token_ids, completion_mask: [B, T] -> [B], float64: hundreds of tokens add up to about -1000, where
    float32 has steps of 6e-5, and DPO lives on differences.
    """
    return token_logps(logits, token_ids, completion_mask).sum(dim=1, dtype=torch.float64)


def pointwise_bce(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over the real candidates of the batch (0.0 if there are none).

    scores: [B, L] logits; labels: [B, L] in [0, 1]; mask: [B, L] bool, False = padding -> scalar. PRM's loss,
    and DLCM's.
    """
    losses = F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")
    return losses.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def listwise_softmax(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy between labels / sum(labels) and softmax(scores), the mean over lists with a positive.

    scores, labels: [B, L]; mask: [B, L] bool, False = padding -> scalar. With 0/1 labels the target is
    SetRank's (Pang et al., SIGIR 2020): equal shares on the positives. A list without one has no target and
    does not count; a batch without any positive gives 0.0.
    """
    targets = labels.to(scores.dtype).masked_fill(~mask, 0.0)
    total = targets.sum(dim=1, keepdim=True)  # [B, 1]
    # the lowest finite value: -inf would give NaN for a list of padding alone
    real_scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    log_shares = F.log_softmax(real_scores, dim=1).masked_fill(~mask, 0.0)
    losses = -(targets / total.masked_fill(total == 0, 1.0) * log_shares).sum(dim=1)
    return losses.sum() / (total > 0).sum().clamp(min=1)


RankingLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
RANKING_LOSSES: dict[str, RankingLoss] = {
    "pointwise_bce": pointwise_bce,
    "listwise_softmax": listwise_softmax,
}
