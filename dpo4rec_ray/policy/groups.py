"""Prompts and their completions as tensors: a shared prompt is neither repeated nor padded.

The chosen and the rejected texts of a user have one prompt. Stored once, it is computed once ("Accelerating Direct
Preference Optimization with Prefix Sharing", arXiv 2410.20305): a group is its prompt followed by its completions, and a
completion sees the prompt and itself, never its neighbours. With packing, all groups of a micro-batch follow each other in
one row; without, each has its own, padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpo4rec_ray.policy.batch import OnDevice

TokenIds = Sequence[int]


@dataclass(frozen=True)
class Group:
    """One prompt and k completions of it, in token ids."""

    prompt: TokenIds
    completions: Sequence[TokenIds]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))


@dataclass(frozen=True)
class GroupSpan:
    """Where a group is in the batch: its row, its first column, and the lengths of its parts in order."""

    row: int
    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.prompt + sum(self.completions)


@dataclass
class GroupLayout(OnDevice):
    """What attention must know about a batch of groups: which token may see which."""

    spans: list[GroupSpan]
    positions: torch.Tensor  # [R, T] position of each token in its own sequence (prompt + completion)
    group_ids: torch.Tensor  # [R, T] running number of the group, -1 for padding
    part_ids: torch.Tensor  # [R, T] 0 for the prompt, 1.. for the completions
    # masks by (kind, span, window): the same in every layer; a copy on another device has its own
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)


@dataclass(frozen=True)
class GroupBatch(OnDevice):
    """S completions in R rows of T columns, and which hidden states predict which of their M tokens.

    Completions are numbered in the order of the groups, and within a group in its own order.
    """

    token_ids: torch.Tensor  # [R, T] long
    layout: GroupLayout
    predictors: torch.Tensor  # [M] long, index into the flattened [R * T] of the token before
    targets: torch.Tensor  # [M] long, token ids
    sequence_ids: torch.Tensor  # [M] long, number of the completion
    lengths: torch.Tensor  # [S] long, tokens of each completion

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes, padding excluded."""
        return sum(span.stop - span.start for span in self.layout.spans)


def collate_groups(
    groups: Sequence[Group], pad_id: int, *, packing: bool, multiple_of: int = 1
) -> GroupBatch:
    """Lay out groups: in one row (packing), or each in a row of its own.

    Args:
        groups: every prompt and every completion holds at least one token.
        pad_id: any valid token id.
        packing: all groups in one row.
        multiple_of: the rows' width is padded to a multiple of it.

    Raises:
        ValueError: a prompt or a completion is empty.
    """
    rows: list[list[int]] = []
    spans: list[GroupSpan] = []
    for group in groups:
        if not group.prompt or not all(group.completions) or not group.completions:
            raise ValueError("a group needs a prompt and completions of at least one token each")
        if not rows or not packing:
            rows.append([])
        start = len(rows[-1])
        spans.append(
            GroupSpan(len(rows) - 1, start, len(group.prompt), tuple(len(one) for one in group.completions))
        )
        rows[-1].extend(group.prompt)
        for completion in group.completions:
            rows[-1].extend(completion)
    width = max(map(len, rows))
    width = -(-width // multiple_of) * multiple_of
    token_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    for row, ids in enumerate(rows):
        token_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    positions = torch.zeros_like(token_ids)
    group_ids = torch.full_like(token_ids, -1)
    part_ids = torch.zeros_like(token_ids)
    predictors, sequence_ids, lengths = [], [], []
    for number, span in enumerate(spans):
        offset = span.row * width
        column = span.start + span.prompt
        positions[span.row, span.start : column] = torch.arange(span.prompt)
        group_ids[span.row, span.start : span.stop] = number
        for part, length in enumerate(span.completions, start=1):
            own = slice(column, column + length)
            positions[span.row, own] = torch.arange(span.prompt, span.prompt + length)
            part_ids[span.row, own] = part
            # the prompt's last token predicts the first of every completion
            first = torch.tensor([offset + span.start + span.prompt - 1])
            predictors.append(torch.cat([first, torch.arange(offset + column, offset + column + length - 1)]))
            sequence_ids.append(torch.full((length,), len(lengths)))
            lengths.append(length)
            column += length
    flat = token_ids.flatten()
    columns = torch.cat(
        [
            torch.arange(span.row * width + span.start + span.prompt, span.row * width + span.stop)
            for span in spans
        ]
    )
    return GroupBatch(
        token_ids,
        GroupLayout(spans, positions, group_ids, part_ids),
        torch.cat(predictors),
        flat[columns],
        torch.cat(sequence_ids),
        torch.tensor(lengths),
    )


def apart(groups: Sequence[Group]) -> list[Group]:
    """The same completions, each in a group of its own: the layout without prefix sharing."""
    return [Group(group.prompt, [completion]) for group in groups for completion in group.completions]
