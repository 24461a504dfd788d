"""Training rows in Arrow tables, converted one at a time, so that a million pairs are never Python lists at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.policy.objectives import TrainingRow


class ArrowRows(Sequence[TrainingRow]):
    """A table's rows as dicts; each is made when it is read."""

    def __init__(self, table: pa.Table):
        self._table = table.combine_chunks()

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> TrainingRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TrainingRow]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return {name: self._table[name][index].as_py() for name in self._table.column_names}


def pair_lengths(pairs: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays [n]: tokens per pair (the prompt once, and every text), and tokens of its longest prompt + text."""
    prompt = _lengths(pairs["prompt_token_ids"])
    chosen = _lengths(pairs["chosen_token_ids"])
    total, longest = prompt + chosen, chosen.copy()
    rejected = pairs["rejected_token_ids"].combine_chunks()
    owners = pc.list_parent_indices(rejected).to_numpy()
    lengths = _lengths(pc.list_flatten(rejected))
    np.add.at(total, owners, lengths)
    np.maximum.at(longest, owners, lengths)
    return total, prompt + longest


def group_lengths(groups: pa.Table) -> np.ndarray:
    """[n] tokens per row of prompt_token_ids and completions: the prompt once, and every text."""
    total = _lengths(groups["prompt_token_ids"])
    completions = groups["completions"].combine_chunks()
    np.add.at(total, pc.list_parent_indices(completions).to_numpy(), _lengths(pc.list_flatten(completions)))
    return total


def with_reference(pairs: pa.Table, reference: pa.Table) -> pa.Table:
    """Put stored reference log-probabilities beside their pairs.

    Raises:
        ValueError: they are of other pairs.
    """
    if not pairs["user_id"].equals(reference["user_id"]):
        raise ValueError("the stored reference log-probabilities belong to other pairs")
    for name in ("chosen_logp", "rejected_logp"):
        pairs = pairs.append_column(name, reference[name])
    return pairs


def _lengths(column: Any) -> np.ndarray:
    return np.array(pc.list_value_length(column), dtype=np.int64)
