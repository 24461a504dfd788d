"""Token ids to padded tensors. The stored ids are used as they are; texts are never tokenised again.

Sequences are padded on the LEFT, so that all completions end in the same column and a causal LM computes logits for the last
columns only (`logits_to_keep`). This saves most of the work when prompts are long and texts are short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch


class OnDevice:
    """A dataclass of tensors, and of others of its kind."""

    def to(self, device: torch.device | str) -> Self:
        """A copy with all tensors on the device."""
        own = vars(self).items()
        return replace(  # type: ignore[type-var]
            self,
            **{name: value.to(device) for name, value in own if isinstance(value, torch.Tensor | OnDevice)},
        )


@dataclass(frozen=True)
class TokenBatch(OnDevice):
    """B sequences of T tokens; the completion of each lies within its last `num_completion` columns."""

    token_ids: torch.Tensor  # [B, T] long
    attention_mask: torch.Tensor  # [B, T] long, 0 = padding
    completion_mask: torch.Tensor  # [B, T] bool
    num_completion: int

    @property
    def lengths(self) -> torch.Tensor:
        """[B] completion tokens."""
        return self.completion_mask.sum(-1)

    @property
    def sequence_ids(self) -> torch.Tensor:
        """[M] long, number of the completion of each completion token."""
        return self.completion_mask.nonzero()[:, 0]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes, padding excluded."""
        return int(self.attention_mask.sum())


def collate(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int
) -> TokenBatch:
    """Pad B (prompt, completion) pairs on the left into one batch."""
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    width = max(lengths)
    token_ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.long)
    completion_mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, (prompt, completion, length) in enumerate(zip(prompts, completions, lengths, strict=True)):
        token_ids[row, width - length :] = torch.tensor([*prompt, *completion], dtype=torch.long)
        attention_mask[row, width - length :] = 1
        completion_mask[row, width - len(completion) :] = True
    return TokenBatch(token_ids, attention_mask, completion_mask, max(len(c) for c in completions))


def completion_logits(
    model: torch.nn.Module, batch: TokenBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the columns that predict or hold completion tokens: [B, C+1, V], with their ids and mask [B, C+1]."""
    keep = batch.num_completion + 1
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = model(
        input_ids=batch.token_ids,
        attention_mask=batch.attention_mask,
        position_ids=positions,
        logits_to_keep=keep,
        use_cache=False,
    )
    return output.logits, batch.token_ids[:, -keep:], batch.completion_mask[:, -keep:]
