"""Attention over groups (policy.groups): a completion sees its prompt and itself; scores between other tokens are not computed.

Registered with transformers as an attention implementation, so any model that takes one can share prefixes. On the CPU
each group costs two SDPA calls: its prompt with itself (causal), its completions with the whole group (masked). On a GPU
one FlexAttention call with a block mask skips every block in which no token may see another.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.groups import GroupLayout, GroupSpan

NAME = "dpo4rec_groups"
WITHOUT_GROUPS = "set policy.prefix_sharing = false and policy.packing = false"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    groups: GroupLayout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [R, H, T, D], key and value [R, H / n, T, D] -> ([R, T, H, D], None).

    attention_mask is ignored: `groups` says who sees whom. sliding_window: a token sees the `sliding_window` last
    positions of its own sequence, itself included. softcap: scores are cap * tanh(scores / cap) (Gemma 2).
    """
    if query.is_cuda:
        output = _flex(query, key, value, groups, scaling, sliding_window, softcap)
        return output.transpose(1, 2).contiguous(), None
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (one.repeat_interleave(repeats, dim=1) for one in (key, value))
    rows = []
    for row in range(query.shape[0]):
        own = [span for span in groups.spans if span.row == row]
        sizes = [span.stop - span.start for span in own]
        padding = query.shape[2] - sum(sizes)
        # split, not slices: its gradient is one concatenation instead of a zero-filled tensor per slice
        sizes.append(padding)
        parts = zip(*(one[row : row + 1].split(sizes, dim=2) for one in (query, key, value)), strict=True)
        outputs = []
        for span, (q, k, v) in zip([*own, None], parts, strict=True):
            if span is None:
                outputs.append(torch.zeros_like(q))  # padding
            elif softcap:
                outputs.append(_softcapped(q, k, v, _mask(groups, span, sliding_window), scaling, softcap))
            else:
                outputs.extend(_two_calls(q, k, v, groups, span, sliding_window, scaling, dropout))
        rows.append(torch.cat(outputs, dim=2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def _two_calls(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: GroupLayout,
    span: GroupSpan,
    window: int | None,
    scaling: float | None,
    dropout: float,
) -> list[torch.Tensor]:
    longest = span.prompt + max(span.completions)
    window = window if window and window < longest else None
    options = {"scale": scaling, "dropout_p": dropout}
    if window:
        return [F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(groups, span, window), **options)]
    own, rest = q.split([span.prompt, q.shape[2] - span.prompt], dim=2)
    prompt = F.scaled_dot_product_attention(
        own, k[:, :, : span.prompt], v[:, :, : span.prompt], is_causal=True, **options
    )
    mask = _mask(groups, span, None)[span.prompt :]
    return [prompt, F.scaled_dot_product_attention(rest, k, v, attn_mask=mask, **options)]


def _mask(groups: GroupLayout, span: GroupSpan, window: int | None) -> torch.Tensor:
    """[n, n] of one group: True where the row's token may see the column's."""
    known = groups.cache.get((span, window))
    if known is None:
        columns = slice(span.start, span.stop)
        positions, parts = groups.positions[span.row, columns], groups.part_ids[span.row, columns]
        distance = positions[:, None] - positions
        known = (distance >= 0) & ((parts == 0) | (parts[:, None] == parts))
        if window:
            known &= distance < window
        groups.cache[span, window] = known
    return known


def _softcapped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention with a soft cap on its scores, which SDPA does not have."""
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: GroupLayout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, _, width, _ = query.shape
    mask = groups.cache.get(("flex", window))
    if mask is None:
        positions, group_ids, part_ids = groups.positions, groups.group_ids, groups.part_ids

        def seen(
            row: torch.Tensor, _head: torch.Tensor, one: torch.Tensor, other: torch.Tensor
        ) -> torch.Tensor:
            together = group_ids[row, one] == group_ids[row, other]
            distance = positions[row, one] - positions[row, other]
            before = (distance >= 0) & (distance < (window or width))
            return (
                together
                & before
                & ((part_ids[row, other] == 0) | (part_ids[row, one] == part_ids[row, other]))
            )

        mask = create_block_mask(seen, rows, None, width, width, device=str(query.device))
        groups.cache["flex", window] = mask

    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    run = _compiled() if query.is_cuda else flex_attention
    return run(
        query,
        key,
        value,
        score_mod=capped if softcap else None,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def use_grouped_attention(model: Any) -> None:
    """Switch a transformers model to `grouped_attention`; its forward then needs `groups=GroupLayout`.

    Raises:
        UserError: the model's code accepts no other attention, or does not separate the decoder from the head.
    """
    from transformers import AttentionInterface

    if not getattr(model, "_supports_attention_backend", False) or model.get_decoder() is model:
        raise UserError(f"{type(model).__name__} runs only with its own attention; {WITHOUT_GROUPS}")
    AttentionInterface.register(NAME, grouped_attention)
    model.set_attn_implementation(NAME)
