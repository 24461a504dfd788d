from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo4rec_ray.policy.groups import Group, GroupBatch, apart, collate_groups

GROUPS = [Group([11, 12, 13], [[21, 22], [31]]), Group([14], [[41, 42]])]
PAD = 9


def test_packed_by_hand() -> None:
    """One row: 6 tokens of the first group, 3 of the second, 1 of padding to a multiple of 5.

    The prompt's last token (column 2) predicts the first token of both completions; the last token of a completion
    predicts nothing. Positions go on from the prompt in each completion.
    """
    batch = collate_groups(GROUPS, PAD, packing=True, multiple_of=5)
    assert batch.token_ids.tolist() == [[11, 12, 13, 21, 22, 31, 14, 41, 42, PAD]]
    assert batch.layout.positions.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 0]]
    assert batch.layout.group_ids.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1, -1]]
    assert batch.layout.part_ids.tolist() == [[0, 0, 0, 1, 1, 2, 0, 1, 1, 0]]
    assert batch.predictors.tolist() == [2, 3, 2, 6, 7]
    assert batch.targets.tolist() == [21, 22, 31, 41, 42]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 2, 2]
    assert batch.lengths.tolist() == [2, 1, 2]
    assert batch.num_tokens == 9


def test_a_row_for_each_group_by_hand() -> None:
    """Without packing: 2 rows of 6, padded on the right; the second row's places start at 6."""
    batch = collate_groups(GROUPS, PAD, packing=False)
    assert batch.token_ids.tolist() == [[11, 12, 13, 21, 22, 31], [14, 41, 42, PAD, PAD, PAD]]
    assert batch.layout.positions.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 0, 0, 0]]
    assert batch.layout.group_ids.tolist() == [[0] * 6, [1, 1, 1, -1, -1, -1]]
    assert batch.layout.part_ids.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 1, 0, 0, 0]]
    assert batch.predictors.tolist() == [2, 3, 2, 6, 7]
    assert batch.targets.tolist() == [21, 22, 31, 41, 42]
    assert batch.num_tokens == 9


def test_apart_repeats_the_prompt() -> None:
    alone = apart(GROUPS)
    assert [(one.prompt, one.completions) for one in alone] == [
        ([11, 12, 13], [[21, 22]]),
        ([11, 12, 13], [[31]]),
        ([14], [[41, 42]]),
    ]
    assert [one.num_tokens for one in alone] == [5, 4, 3]
    assert [one.num_tokens for one in GROUPS] == [6, 3]


@pytest.mark.parametrize("bad", [Group([], [[1]]), Group([1], []), Group([1], [[2], []])])
@pytest.mark.parametrize("packing", [False, True])
def test_nothing_may_be_empty(bad: Group, packing: bool) -> None:
    with pytest.raises(ValueError, match="at least one token each"):
        collate_groups([*GROUPS, bad], PAD, packing=packing)


def test_masks_are_not_carried_to_another_device() -> None:
    """The layout's cache holds tensors of the old device."""
    batch = collate_groups(GROUPS, PAD, packing=True)
    batch.layout.cache["a mask"] = torch.ones(1)
    moved = batch.to("meta")
    assert moved.layout.cache == {}
    assert batch.layout.cache
    assert moved.layout.spans == batch.layout.spans
    tensors = [
        value for part in (moved, moved.layout) for value in vars(part).values() if torch.is_tensor(value)
    ]
    assert len(tensors) == 8
    assert all(tensor.is_meta for tensor in tensors)


TOKENS = st.lists(st.integers(0, 50), min_size=1, max_size=6)
DRAWN = st.lists(st.builds(Group, TOKENS, st.lists(TOKENS, min_size=1, max_size=3)), min_size=1, max_size=4)


def seen(batch: GroupBatch, group: int, part: int) -> list[int]:
    """What a completion sees, itself included: its group's prompt and its own part, in the order of the columns."""
    layout = batch.layout
    own = (layout.group_ids == group) & ((layout.part_ids == 0) | (layout.part_ids == part))
    assert layout.positions[own].tolist() == list(range(int(own.sum())))
    return batch.token_ids[own].tolist()


@given(groups=DRAWN, packing=st.booleans(), multiple_of=st.integers(1, 9))
def test_every_sequence_can_be_read_back(groups: list[Group], packing: bool, multiple_of: int) -> None:
    """What a completion sees is its prompt and itself at positions 0, 1, ...; predictors come right before targets."""
    batch = collate_groups(groups, PAD, packing=packing, multiple_of=multiple_of)
    for number, group in enumerate(groups):
        for part, completion in enumerate(group.completions, start=1):
            assert seen(batch, number, part) == [*group.prompt, *completion]
    assert len(batch.token_ids) == (1 if packing else len(groups))
    assert batch.token_ids.shape[1] % multiple_of == 0
    widest = sum(one.num_tokens for one in groups) if packing else max(one.num_tokens for one in groups)
    assert batch.token_ids.shape[1] - widest < multiple_of
    assert batch.num_tokens == sum(one.num_tokens for one in groups)
    assert int((batch.layout.group_ids >= 0).sum()) == batch.num_tokens
    completions = [list(one) for group in groups for one in group.completions]
    targets = batch.targets.split(batch.lengths.tolist())
    assert [one.tolist() for one in targets] == completions
    previous = batch.token_ids.flatten()[batch.predictors].split(batch.lengths.tolist())
    prompts = [group.prompt for group in groups for _ in group.completions]
    for prompt, completion, before in zip(prompts, completions, previous, strict=True):
        assert before.tolist() == [prompt[-1], *completion[:-1]]
