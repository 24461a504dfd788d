from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo4rec_ray.core.preference import PREFERENCE_LOSSES, SMOOTHED, Ratios, chosen_nll

BETA = 0.5
# Two prompts. First: chosen ratio 4 over 8 tokens; rejected -2 over 4 and 1 over 2: margins 6 and 3, per token
# .5 - (-.5) = 1 and .5 - .5 = 0. Second: chosen 1 over 2, one rejected, 3 over 4: margin -2, per token -.25; what stands
# in the place of its second rejected must not be seen.
EXAMPLE = {
    "chosen": [4.0, 1.0],
    "rejected": [[-2.0, 1.0], [3.0, 77.0]],
    "mask": [[True, True], [True, False]],
    "chosen_length": [8, 2],
    "rejected_length": [[4, 2], [4, 9]],
}


def ratios_of(**columns: Any) -> Ratios:
    return Ratios(**{name: torch.tensor(values) for name, values in columns.items()})


def pair(chosen: float, rejected: float, lengths: tuple[int, int] = (1, 1)) -> Ratios:
    """One prompt with one rejected."""
    return ratios_of(
        chosen=[chosen],
        rejected=[[rejected]],
        mask=[[True]],
        chosen_length=[lengths[0]],
        rejected_length=[[lengths[1]]],
    )


def nls(z: float) -> float:
    """-log sigmoid(z)."""
    return math.log(1 + math.exp(-z))


def test_margins_by_hand() -> None:
    ratios = ratios_of(**EXAMPLE)
    assert ratios.margin[0].tolist() == [6, 3]
    assert ratios.margin[1, 0] == -2
    assert ratios.margin_per_token[0].tolist() == [1, 0]
    assert ratios.margin_per_token[1, 0] == -0.25


@pytest.mark.parametrize(
    ("name", "smoothing", "expected"),
    [
        # beta m = 3 and 1.5 | -1
        ("sigmoid", 0.0, [(nls(3) + nls(1.5)) / 2, nls(-1)]),
        # cDPO: .9 of the pair as it stands, .1 swapped
        ("sigmoid", 0.1, [(0.9 * nls(3) + 0.1 * nls(-3) + 0.9 * nls(1.5) + 0.1 * nls(-1.5)) / 2,
                          0.9 * nls(-1) + 0.1 * nls(1)]),
        ("robust", 0.0, [(nls(3) + nls(1.5)) / 2, nls(-1)]),
        ("robust", 0.2, [(0.8 * nls(3) - 0.2 * nls(-3) + 0.8 * nls(1.5) - 0.2 * nls(-1.5)) / 2 / 0.6,
                         (0.8 * nls(-1) - 0.2 * nls(1)) / 0.6]),
        # 1 / (2 beta) = 1: (6 - 1)^2 and (3 - 1)^2 | (-2 - 1)^2
        ("ipo", 0.0, [(25 + 4) / 2, 9.0]),
        # (1 - 1)^2 and (0 - 1)^2 | (-.25 - 1)^2
        ("ipo_norm", 0.0, [1 / 2, 1.5625]),
        # 1 - 3 < 0 and 1 - 1.5 < 0 | 1 + 1
        ("hinge", 0.0, [0.0, 2.0]),
        # beta m = .5 and 0 | -.125
        ("sigmoid_norm", 0.0, [(nls(0.5) + math.log(2)) / 2, nls(-0.125)]),
        ("sigmoid_norm", 0.1, [(0.9 * nls(0.5) + 0.1 * nls(-0.5) + math.log(2)) / 2,
                               0.9 * nls(-0.125) + 0.1 * nls(0.125)]),
        # -log sigmoid(-log(e^-3 + e^-1.5)) = log(1 + e^-3 + e^-1.5) | one rejected: as sigmoid
        ("softmax", 0.0, [math.log(1 + math.exp(-3) + math.exp(-1.5)), nls(-1)]),
    ],
)  # fmt: skip
def test_losses_by_hand(name: str, smoothing: float, expected: list[float]) -> None:
    losses = PREFERENCE_LOSSES[name](ratios_of(**EXAMPLE), BETA, smoothing)
    torch.testing.assert_close(losses, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_hinge_between_its_ends() -> None:
    """1 - .5 * 1 = .5; it ends where beta m = 1."""
    assert PREFERENCE_LOSSES["hinge"](pair(1.0, 0.0), BETA, 0.0).tolist() == [0.5]
    assert PREFERENCE_LOSSES["hinge"](pair(2.0, 0.0), BETA, 0.0).tolist() == [0.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", math.log(2)),
        ("robust", math.log(2)),
        ("ipo", 1.0),
        ("ipo_norm", 1.0),
        ("hinge", 1.0),
        ("sigmoid_norm", math.log(2)),
        ("softmax", None),
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_rejected", [1, 3])
def test_at_the_reference(name: str, expected: float | None, smoothing: float, num_rejected: int) -> None:
    """Ratios of zero: ln 2 (softmax: ln(1 + K)), whatever the smoothing; (0 - 1 / (2 beta))^2 = 1; 1 - 0."""
    ratios = ratios_of(
        chosen=[0.0],
        rejected=[[0.0] * num_rejected],
        mask=[[True] * num_rejected],
        chosen_length=[7],
        rejected_length=[[5] * num_rejected],
    )
    (loss,) = PREFERENCE_LOSSES[name](ratios, BETA, smoothing).tolist()
    assert loss == pytest.approx(math.log(1 + num_rejected) if expected is None else expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "smoothing", "slope"),
    [
        ("sigmoid", 0.0, -BETA / 2),
        ("sigmoid", 0.1, -BETA / 2 * 0.8),  # (1 - 2 e) of it
        ("robust", 0.1, -BETA / 2 / 0.8),  # (1 - e + e) / (1 - 2 e) of it
        ("ipo", 0.0, -1 / BETA),  # 2 (0 - 1 / (2 beta))
        ("ipo_norm", 0.0, -1 / BETA / 8),  # over 8 tokens
        ("hinge", 0.0, -BETA),
        ("sigmoid_norm", 0.0, -BETA / 2 / 8),
        ("softmax", 0.0, -BETA / 2),
    ],
)
def test_slope_at_the_reference(name: str, smoothing: float, slope: float) -> None:
    """d loss / d chosen ratio by hand; the rejected's is the opposite: chosen goes up, rejected down."""
    ratios = pair(0.0, 0.0, lengths=(8, 8))
    ratios.chosen.requires_grad_()
    ratios.rejected.requires_grad_()
    PREFERENCE_LOSSES[name](ratios, BETA, smoothing).sum().backward()
    torch.testing.assert_close(ratios.chosen.grad, torch.tensor([slope]))
    torch.testing.assert_close(ratios.rejected.grad, torch.tensor([[-slope]]))


def test_softmax_pushes_the_nearest_rejected_most() -> None:
    """Margins ln 2 and ln 4 at beta 1: shares of chosen and rejected 1 : 1/2 : 1/4, the rejected's gradients 2/7, 1/7."""
    ratios = ratios_of(
        chosen=[math.log(4)],
        rejected=[[math.log(2), 0.0]],
        mask=[[True, True]],
        chosen_length=[1],
        rejected_length=[[1, 1]],
    )
    ratios.rejected.requires_grad_()
    losses = PREFERENCE_LOSSES["softmax"](ratios, 1.0, 0.0)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([math.log(7 / 4)]))
    torch.testing.assert_close(ratios.rejected.grad, torch.tensor([[2 / 7, 1 / 7]]))


def test_ipo_pulls_back_beyond_its_target() -> None:
    """The margin's target is 1 / (2 beta) = 1; at 3 the gradient is 2 (3 - 1) = 4, downwards for the chosen."""
    ratios = pair(3.0, 0.0)
    ratios.chosen.requires_grad_()
    PREFERENCE_LOSSES["ipo"](ratios, BETA, 0.0).sum().backward()
    torch.testing.assert_close(ratios.chosen.grad, torch.tensor([4.0]))


def test_robust_is_unbiased() -> None:
    """(1 - e) of the loss of a kept pair + e of that of a swapped one is the plain loss of the true pair."""
    kept, swapped = (
        PREFERENCE_LOSSES["robust"](pair(*ends), BETA, 0.3) for ends in ((2.0, -1.0), (-1.0, 2.0))
    )
    torch.testing.assert_close(0.7 * kept + 0.3 * swapped, torch.tensor([nls(1.5)]))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_only_the_losses_that_say_so_read_the_smoothing(name: str) -> None:
    plain, smoothed = (PREFERENCE_LOSSES[name](ratios_of(**EXAMPLE), BETA, e) for e in (0.0, 0.1))
    assert torch.equal(plain, smoothed) == (name not in SMOOTHED)


def test_chosen_nll_by_hand() -> None:
    """-(-6) / 4 and -(-3) / 1; an empty completion costs nothing."""
    values = torch.tensor([-6.0, -3.0, 0.0], requires_grad=True)
    losses = chosen_nll(values, torch.tensor([4, 1, 0]))
    assert losses.tolist() == [1.5, 3.0, 0.0]
    losses.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [-0.25, -1.0, -1.0]


FINITE = st.floats(-50, 50, width=32)


@st.composite
def drawn(draw: st.DrawFn) -> Ratios:
    """1 to 4 prompts with up to 4 rejected each, at least one of them real."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    counts = [draw(st.integers(1, width)) for _ in range(rows)]
    values = st.lists(FINITE, min_size=width, max_size=width)
    lengths = st.lists(st.integers(1, 40), min_size=width, max_size=width)
    return ratios_of(
        chosen=[draw(FINITE) for _ in range(rows)],
        rejected=[draw(values) for _ in range(rows)],
        mask=[[place < count for place in range(width)] for count in counts],
        chosen_length=[draw(st.integers(1, 40)) for _ in range(rows)],
        rejected_length=[draw(lengths) for _ in range(rows)],
    )


def losses_of(name: str, ratios: Ratios, smoothing: float = 0.0) -> torch.Tensor:
    return PREFERENCE_LOSSES[name](ratios, BETA, smoothing)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@given(ratios=drawn())
def test_absent_rejected_change_nothing(name: str, ratios: Ratios) -> None:
    """Any value behind the mask, NaN and an infinity too: the same losses; no gradient behind it, finite ones before."""
    plain = losses_of(name, ratios)
    for hole in (math.nan, math.inf, -math.inf, 1e4):
        rejected = ratios.rejected.masked_fill(~ratios.mask, hole).requires_grad_()
        chosen = ratios.chosen.clone().requires_grad_()
        losses = losses_of(name, replace(ratios, chosen=chosen, rejected=rejected))
        torch.testing.assert_close(losses, plain, rtol=0, atol=0)
        losses.sum().backward()
        assert rejected.grad is not None and chosen.grad is not None
        assert torch.isfinite(chosen.grad).all()
        assert torch.isfinite(rejected.grad).all()
        assert (rejected.grad[~ratios.mask] == 0).all()


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_prompt_without_rejected_costs_nothing(name: str) -> None:
    ratios = ratios_of(
        chosen=[2.0], rejected=[[1.0]], mask=[[False]], chosen_length=[1], rejected_length=[[1]]
    )
    ratios.chosen.requires_grad_()
    ratios.rejected.requires_grad_()
    losses = losses_of(name, ratios)
    losses.sum().backward()
    assert losses.tolist() == [0.0]
    assert ratios.chosen.grad is not None and ratios.rejected.grad is not None
    assert ratios.chosen.grad.tolist() == [0.0]
    assert ratios.rejected.grad.tolist() == [[0.0]]


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@given(ratios=drawn())
def test_rows_do_not_meet(name: str, ratios: Ratios) -> None:
    """A batch's losses are those of its prompts alone, without the places that padded them."""
    together = losses_of(name, ratios)
    for row in range(len(together)):
        count = int(ratios.mask[row].sum())
        alone = Ratios(
            ratios.chosen[row : row + 1],
            ratios.rejected[row : row + 1, :count],
            ratios.mask[row : row + 1, :count],
            ratios.chosen_length[row : row + 1],
            ratios.rejected_length[row : row + 1, :count],
        )
        torch.testing.assert_close(losses_of(name, alone), together[row : row + 1])


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - {"softmax"}))
@given(ratios=drawn())
def test_k_rejected_are_the_mean_of_k_pairs(name: str, ratios: Ratios) -> None:
    together = losses_of(name, ratios, 0.1)
    for row, loss in enumerate(together):
        pairs = [
            losses_of(
                name,
                pair(
                    ratios.chosen[row].item(),
                    ratios.rejected[row, k].item(),
                    (int(ratios.chosen_length[row]), int(ratios.rejected_length[row, k])),
                ),
                0.1,
            )
            for k in range(int(ratios.mask[row].sum()))
        ]
        torch.testing.assert_close(loss, torch.cat(pairs).mean(), rtol=1e-5, atol=1e-6)


@given(chosen=FINITE, rejected=FINITE)
def test_softmax_of_one_rejected_is_sigmoid(chosen: float, rejected: float) -> None:
    one = pair(chosen, rejected)
    torch.testing.assert_close(losses_of("softmax", one), losses_of("sigmoid", one))


@given(ratios=drawn())
def test_softmax_is_the_cross_entropy_of_the_chosen(ratios: Ratios) -> None:
    """-log of its share in the softmax over beta times all ratios (S-DPO, eq. 10, the other way to write it)."""
    scores = torch.cat([ratios.chosen[:, None], ratios.rejected.masked_fill(~ratios.mask, -torch.inf)], dim=1)
    expected = -(BETA * scores).log_softmax(dim=1)[:, 0]
    torch.testing.assert_close(losses_of("softmax", ratios), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - {"ipo", "ipo_norm"}))
@given(ratios=drawn(), step=st.floats(0.5, 20, width=32))
def test_a_larger_margin_never_costs_more(name: str, ratios: Ratios, step: float) -> None:
    """IPO aside, which has a target."""
    better = replace(ratios, chosen=ratios.chosen + step)
    assert (losses_of(name, better) <= losses_of(name, ratios) + 1e-6).all()


@pytest.mark.parametrize("name", ["sigmoid", "robust", "sigmoid_norm", "softmax"])
def test_huge_margins_stay_finite(name: str) -> None:
    """A margin of -1e4 at beta .5 costs 5e3, not inf, and pulls with the full slope; of +1e4 nothing."""
    ratios = ratios_of(
        chosen=[-1e4, 1e4],
        rejected=[[0.0], [0.0]],
        mask=[[True], [True]],
        chosen_length=[1, 1],
        rejected_length=[[1], [1]],
    )
    ratios.chosen.requires_grad_()
    losses = losses_of(name, ratios)
    losses.sum().backward()
    assert losses.tolist() == [5e3, 0.0]
    assert ratios.chosen.grad is not None
    assert ratios.chosen.grad.tolist() == [-BETA, 0.0]
