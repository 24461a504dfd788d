"""Pairs read from Arrow: rows, lengths, and the reference beside them."""

from __future__ import annotations

import pyarrow as pa
import pytest

from dpo4rec_ray.policy.rows import ArrowRows, pair_lengths, with_reference


def pairs() -> pa.Table:
    rows = [
        {
            "user_id": 7,
            "prompt_token_ids": [1, 2, 3],
            "chosen_token_ids": [4],
            "rejected_token_ids": [[5, 6]],
        },
        {
            "user_id": 8,
            "prompt_token_ids": [1],
            "chosen_token_ids": [4, 4],
            "rejected_token_ids": [[5], [6, 6, 6]],
        },
    ]
    return pa.Table.from_pylist(rows)


def test_rows_are_read_as_they_are_asked_for() -> None:
    table = pa.concat_tables([pairs(), pairs()])
    rows = ArrowRows(table)
    assert len(rows) == 4
    assert rows[3] == table.to_pylist()[3]
    assert rows[1:3] == table.to_pylist()[1:3]


def test_lengths_by_hand() -> None:
    """3 + 1 + 2 tokens, longest 3 + 2; 1 + 2 + 1 + 3, longest 1 + 3. Of part of a table too."""
    total, longest = pair_lengths(pairs())
    assert total.tolist() == [6, 7] and longest.tolist() == [5, 4]
    total, longest = pair_lengths(pa.concat_tables([pairs(), pairs()]).slice(1, 2))
    assert total.tolist() == [7, 6] and longest.tolist() == [4, 5]


def test_a_reference_of_other_pairs_is_refused() -> None:
    reference = pa.table(
        {"user_id": [7, 8], "chosen_logp": [-1.0, -2.0], "rejected_logp": [[-3.0], [-4.0, -5.0]]}
    )
    rows = ArrowRows(with_reference(pairs(), reference))
    assert (rows[1]["chosen_logp"], rows[1]["rejected_logp"]) == (-2.0, [-4.0, -5.0])
    with pytest.raises(ValueError, match="other pairs"):
        with_reference(pairs(), reference.slice(0, 1))
