"""Values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dpo4rec_ray.core import policy_gradient as pg
from dpo4rec_ray.core.policy_gradient import Shape, advantages

# Two groups: one of two texts (2 and 1 tokens), one of a single text (3 tokens).
SHAPE = Shape(torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 0, 1]), torch.tensor([2, 1, 3]))


def test_advantages_are_distances_from_the_mean():
    rewards = np.array([1.0, 2.0, 6.0])
    np.testing.assert_allclose(advantages(rewards, "none"), [-2, -1, 3])
    std = math.sqrt((4 + 1 + 9) / 2)
    np.testing.assert_allclose(advantages(rewards, "std"), np.array([-2, -1, 3]) / (std + 1e-4))


@pytest.mark.parametrize("rewards", [[1.0], [2.0, 2.0, 2.0], [1.0, math.nan], []])
def test_a_group_without_spread_teaches_nothing(rewards):
    assert advantages(np.array(rewards), "std") is None


def test_clipping_bounds_what_is_gained_and_not_what_is_lost():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]).double()
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0]).double()
    loss, clipped = pg.clipped_surrogate(ratio.log(), advantage, 0.2, 0.3)
    torch.testing.assert_close(loss, torch.tensor([-2.6, 3.0, -1.0, 1.6, -1.1]).double())
    assert clipped.tolist() == [True, False, False, True, False]


def test_no_gradient_comes_from_a_clipped_token():
    log_ratio = torch.tensor([math.log(1.5), 0.0], requires_grad=True)
    loss, _ = pg.clipped_surrogate(log_ratio, torch.tensor([1.0, 1.0]), 0.2, 0.2)
    loss.sum().backward()
    assert log_ratio.grad.tolist() == [0.0, -1.0]


def test_the_divergence_is_zero_at_the_reference_and_never_negative():
    log_ratio = torch.tensor([0.0, math.log(2), -math.log(2), -200.0]).double()
    found = pg.divergence(log_ratio, -log_ratio)
    expected = [0.0, 2 * (0.5 - 1 + math.log(2)), 0.5 * (2 - 1 - math.log(2)), 1.0]
    torch.testing.assert_close(found, torch.tensor(expected).double())


@pytest.mark.parametrize("reference", [[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
def test_the_divergence_and_its_gradient_are_right_on_average(reference):
    """Over what the old policy draws: KL(pi || reference), and its derivative by the policy's logits."""
    logits = torch.tensor([0.3, -0.4, 0.9]).double().requires_grad_()
    old, reference = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor(reference).double()
    policy = logits.log_softmax(0)
    found = (old * pg.divergence(policy - old.log(), reference.log() - policy)).sum()
    exact = (logits.softmax(0) * (logits.log_softmax(0) - reference.log())).sum()
    torch.testing.assert_close(found, exact)
    [gradient], [right] = torch.autograd.grad(found, logits), torch.autograd.grad(exact, logits)
    torch.testing.assert_close(gradient, right)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sequence", [1 / 4, 1 / 4, 1 / 2, 1 / 3, 1 / 3, 1 / 3]),
        ("token", [1 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3]),
        ("constant", [1 / 20, 1 / 20, 1 / 20, 1 / 10, 1 / 10, 1 / 10]),
    ],
)
def test_weights_of_tokens(name, expected):
    weights = pg.TOKEN_WEIGHTS[name](SHAPE, 10)
    torch.testing.assert_close(weights, torch.tensor(expected).double())
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    sums = pg.sums_per_group(values, weights, SHAPE)
    torch.testing.assert_close(
        sums, torch.stack([(weights * values)[:3].sum(), (weights * values)[3:].sum()])
    )


def test_importance_weights_are_capped():
    found = pg.truncated_importance(torch.tensor([0.0, math.log(0.5), math.log(1.5), 5.0]).double(), 2.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 1.5, 2.0]).double())
