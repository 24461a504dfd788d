from __future__ import annotations

import math

import pytest
import torch

from dpo4rec_ray.core.losses import (
    RANKING_LOSSES,
    listwise_softmax,
    pointwise_bce,
    sequence_logps,
    token_logps,
)

# Vocabulary of 2; softmax([0, ln 3]) = (1/4, 3/4), softmax([0, 0]) = (1/2, 1/2).
LOGITS = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [0.0, math.log(3)], [5.0, -5.0]]])
TOKEN_IDS = torch.tensor([[0, 1, 1, 0]])


def test_token_and_sequence_logps_by_hand() -> None:
    """Logits 0 give token 1 (id 1) 3/4, logits 1 give token 2 (id 1) 1/2, logits 2 give token 3 (id 0) 1/4.

    Completion = tokens 2 and 3: columns (0, ln 1/2, ln 1/4), sum -ln 8. The last logits predict nothing.
    """
    mask = torch.tensor([[False, False, True, True]])
    expected = torch.tensor([[0.0, math.log(1 / 2), math.log(1 / 4)]])
    torch.testing.assert_close(token_logps(LOGITS, TOKEN_IDS, mask), expected)
    torch.testing.assert_close(sequence_logps(LOGITS, TOKEN_IDS, mask), torch.tensor([-math.log(8)]).double())


def test_first_token_has_no_prediction() -> None:
    """With every token in the mask the sum holds three terms, not four: ln(3/4 * 1/2 * 1/4) = ln(3/32)."""
    mask = torch.ones(1, 4, dtype=torch.long)
    torch.testing.assert_close(
        sequence_logps(LOGITS, TOKEN_IDS, mask), torch.tensor([math.log(3 / 32)]).double()
    )


def test_logps_ignore_what_padded_places_hold() -> None:
    """Any logits, NaN too, and any token id at padding, right or left, change neither value nor gradient."""
    logits = torch.cat([torch.full((1, 2, 2), math.nan), LOGITS, torch.full((1, 2, 2), math.inf)], dim=1)
    token_ids = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 1]])
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0]])
    torch.testing.assert_close(sequence_logps(logits, token_ids, mask), torch.tensor([-math.log(8)]).double())
    finite = torch.nan_to_num(logits, posinf=9.0).requires_grad_()
    sequence_logps(finite, token_ids, mask).sum().backward()
    assert finite.grad is not None
    assert finite.grad.abs().sum(dim=2).flatten().nonzero().flatten().tolist() == [3, 4]


def test_logps_add_up_in_float64() -> None:
    """4,000 tokens of -ln 2, from bfloat16 logits too: float32 is off by its steps of 2e-4, bfloat16 would stall."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        logits = torch.zeros(1, 4001, 2, dtype=dtype)
        value = sequence_logps(logits, torch.zeros(1, 4001, dtype=torch.long), torch.ones(1, 4001))
        assert value.dtype == torch.float64
        exact = -4000 * torch.tensor([2.0], dtype=torch.promote_types(dtype, torch.float32)).log().double()
        torch.testing.assert_close(value, exact, atol=1e-9, rtol=0)


def test_pointwise_bce_by_hand() -> None:
    """sigmoid(ln 3) = 3/4, label 1: ln 4/3; sigmoid(0) = 1/2, label 0: ln 2; without padding ln(8/3) / 2."""
    scores = torch.tensor([[math.log(3), 0.0, 100.0]])
    loss = pointwise_bce(scores, torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(loss, torch.tensor(math.log(8 / 3) / 2))


def test_listwise_softmax_by_hand() -> None:
    """Scores (ln 3, 0, 0): shares 3/5, 1/5, 1/5. Positives first and second: (ln 5/3 + ln 5) / 2.

    The list without counts nowhere.
    """
    scores = torch.tensor([[math.log(3), 0.0, 0.0, 100.0], [1.0, 2.0, 3.0, 4.0]])
    labels = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    expected = torch.tensor((math.log(5 / 3) + math.log(5)) / 2)
    torch.testing.assert_close(listwise_softmax(scores, labels, mask), expected)


def test_listwise_softmax_moves_negative_logits() -> None:
    """KAR's ReLU form has no gradient at logits <= 0; this one raises the positive.

    Its gradient at a score is share - target: 1/2 - 1 and 1/2 - 0.
    """
    scores = torch.tensor([[-3.0, -3.0]], requires_grad=True)
    listwise_softmax(scores, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[-0.5, 0.5]]))


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_ranking_losses_ignore_padding(name: str) -> None:
    """Padded scores of -inf, padded labels, a wholly padded list: the loss without them, finite gradients."""
    loss = RANKING_LOSSES[name]
    scores, labels = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    plain = loss(scores, labels, torch.ones(1, 3, dtype=torch.bool))
    padded_scores = torch.tensor([[0.3, -1.0, 2.0, -math.inf], [-math.inf] * 4], requires_grad=True)
    padded_labels = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0] * 4])
    mask = torch.tensor([[True, True, True, False], [False] * 4])
    padded = loss(padded_scores, padded_labels, mask)
    torch.testing.assert_close(padded, plain)
    padded.backward()
    assert padded_scores.grad is not None
    assert torch.isfinite(padded_scores.grad).all()
    assert (padded_scores.grad[~mask] == 0).all()


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_ranking_losses_of_nothing_are_zero(name: str) -> None:
    """A batch of padding only (a last shard can be one) gives 0.0 and zero gradients, not NaN."""
    scores = torch.randn(2, 3, requires_grad=True)
    value = RANKING_LOSSES[name](scores, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    value.backward()
    assert value.item() == 0.0
    assert scores.grad is not None
    assert (scores.grad == 0).all()
