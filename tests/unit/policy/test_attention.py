"""Attention over groups against plain causal attention over each sequence alone, in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.attention import NAME, _flex, grouped_attention, use_grouped_attention
from dpo4rec_ray.policy.groups import Group, GroupBatch, collate_groups
from tests.families import tiny_model

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
GROUPS = [
    Group([1] * 9, [[1] * 5, [1] * 12, [1]]),
    Group([1], [[1] * 3]),
    Group([1] * 4, [[1], [1] * 2]),
]
Attention = Callable[..., torch.Tensor]


def grouped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: GroupBatch, **options: float | None
) -> torch.Tensor:
    """[R, H, T, D], as the queries."""
    output, weights = grouped_attention(torch.nn.Module(), q, k, v, None, groups=batch.layout, **options)
    assert weights is None
    return output.transpose(1, 2)


def flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: GroupBatch, **options: float | None
) -> torch.Tensor:
    """The GPU's path, uncompiled, on the CPU."""
    with warnings.catch_warnings():  # "called without torch.compile()"
        warnings.simplefilter("ignore")
        return _flex(
            q,
            k,
            v,
            batch.layout,
            options.get("scaling"),
            options.get("sliding_window"),
            options.get("softcap"),
        )


def one_by_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: GroupBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Each prompt + completion by itself, each query a loop: softmax over the keys up to it. 0 at padding."""
    output = torch.zeros_like(q)
    layout = batch.layout
    for place in layout.spans:
        column = place.start + place.prompt
        for length in place.completions:
            columns = [*range(place.start, place.start + place.prompt), *range(column, column + length)]
            column += length
            for position, at in enumerate(columns):
                first = max(0, position + 1 - sliding_window) if sliding_window else 0
                keys = columns[first : position + 1]
                for head in range(q.shape[1]):
                    own = head * k.shape[1] // q.shape[1]
                    scores = k[place.row, own, keys] @ q[place.row, head, at]
                    scores = scores * (q.shape[3] ** -0.5 if scaling is None else scaling)
                    if softcap:
                        scores = softcap * torch.tanh(scores / softcap)
                    output[place.row, head, at] = scores.softmax(0) @ v[place.row, own, keys]
    return output


def random_inputs(batch: GroupBatch, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v; scores of a few units, so that attention is neither flat nor on one key."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = batch.token_ids.shape
    return [
        1.5 * torch.randn(rows, heads, width, WIDTH, generator=generator, dtype=dtype)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def real(batch: GroupBatch) -> torch.Tensor:
    """[R, 1, T, 1] 1.0 at tokens, 0.0 at padding."""
    return (batch.layout.group_ids >= 0)[:, None, :, None].double()


OPTIONS = {
    "plain": {},
    "scaled": {"scaling": 0.3},
    "window": {"sliding_window": 4},
    "window of one": {"sliding_window": 1},
    "window wider than all": {"sliding_window": 64},
    "softcap": {"softcap": 1.5},
    "window and softcap": {"sliding_window": 4, "softcap": 1.5, "scaling": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("attention", [grouped, flex])
def test_values_equal_each_sequence_alone(attention: Attention, packing: bool, options: dict) -> None:
    batch = collate_groups(GROUPS, 0, packing=packing, multiple_of=8)
    q, k, v = random_inputs(batch)
    expected = one_by_one(q, k, v, batch, **options)
    # by hand the softmax is float32, as in transformers' eager attention
    tolerance = 1e-6 if "softcap" in options else 1e-12
    found = attention(q, k, v, batch, **options)
    torch.testing.assert_close(found * real(batch), expected, rtol=0, atol=tolerance)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("packing", [False, True])
def test_gradients_equal_each_sequence_alone(packing: bool, options: dict) -> None:
    """Of q, k and v; the prompt's keys collect what all completions ask of them."""
    batch = collate_groups(GROUPS, 0, packing=packing, multiple_of=8)
    upstream = torch.randn(
        batch.token_ids.shape[0], HEADS, batch.token_ids.shape[1], WIDTH, dtype=torch.float64
    )
    gradients = []
    for attention in (one_by_one, grouped):
        inputs = [one.requires_grad_() for one in random_inputs(batch)]
        gradients.append(torch.autograd.grad((attention(*inputs, batch, **options) * upstream).sum(), inputs))
    for expected, found in zip(*gradients, strict=True):
        tolerance = 1e-5 if "softcap" in options else 1e-12
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_padding_is_zero_and_unseen() -> None:
    """NaN at padding stays there, and no gradient reaches it."""
    batch = collate_groups(GROUPS, 0, packing=False, multiple_of=8)
    empty = (real(batch) == 0).expand(-1, KEY_HEADS, -1, WIDTH)
    q, k, v = random_inputs(batch)
    plain = grouped(q, k, v, batch)
    for one in (k, v):
        one[empty] = torch.nan
        one.requires_grad_()
    padded = grouped(q, k, v, batch)
    assert torch.equal(padded, plain)
    assert (padded.masked_select(real(batch) == 0) == 0).all()
    padded.sum().backward()
    assert k.grad is not None and v.grad is not None
    assert (k.grad[empty] == 0).all()
    assert torch.isfinite(v.grad).all()


@pytest.mark.parametrize("attention", [grouped, flex])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 4}, {"softcap": 1.5}], ids=["plain", "window", "softcap"]
)
def test_who_sees_whom(attention: Attention, options: dict) -> None:
    """Other keys and values in completion 2 of the first group: bitwise the same outputs everywhere but there."""
    batch = collate_groups(GROUPS, 0, packing=True)
    q, k, v = random_inputs(batch)
    before = attention(q, k, v, batch, **options)
    changed = (batch.layout.group_ids == 0) & (batch.layout.part_ids == 2)
    for one in (k, v):
        one[changed[:, None].expand(-1, KEY_HEADS, -1)] += 1.0
    after = attention(q, k, v, batch, **options)
    differs = (after != before).any(dim=3).any(dim=1)
    assert torch.equal(differs, changed)


TOKENS = st.integers(1, 6).map(lambda length: [1] * length)


@settings(max_examples=25)
@given(
    groups=st.lists(
        st.builds(Group, TOKENS, st.lists(TOKENS, min_size=1, max_size=3)), min_size=1, max_size=3
    ),
    packing=st.booleans(),
    multiple_of=st.integers(1, 5),
    window=st.none() | st.integers(1, 13),
    softcap=st.none() | st.just(1.5),
)
def test_any_layout(
    groups: list[Group], packing: bool, multiple_of: int, window: int | None, softcap: float | None
) -> None:
    batch = collate_groups(groups, 0, packing=packing, multiple_of=multiple_of)
    q, k, v = random_inputs(batch)
    options = {"sliding_window": window, "softcap": softcap}
    expected = one_by_one(q, k, v, batch, **options)
    torch.testing.assert_close(grouped(q, k, v, batch, **options), expected, rtol=0, atol=1e-6)


def test_flex_over_several_blocks() -> None:
    """380 tokens are three blocks of FlexAttention's 128, some of which nobody sees: as the CPU's path."""
    groups = [Group([1] * 100, [[1] * 90, [1] * 70]), Group([1] * 50, [[1] * 40, [1] * 30])]
    batch = collate_groups(groups, 0, packing=True, multiple_of=128)
    assert batch.token_ids.shape == (1, 384)
    q, k, v = random_inputs(batch)
    torch.testing.assert_close(
        flex(q, k, v, batch) * real(batch), grouped(q, k, v, batch), rtol=0, atol=1e-12
    )


def test_masks_are_made_once_for_all_layers() -> None:
    batch = collate_groups(GROUPS, 0, packing=True)
    q, k, v = random_inputs(batch)
    for window in (None, 4, None, 4):
        grouped(q, k, v, batch, sliding_window=window)
    # one per group, but for the second, whose longest sequence is as long as the window
    assert len(batch.layout.cache) == len(GROUPS) + 2


def test_a_model_without_the_interface_is_refused() -> None:
    """BLOOM's attention adds biases by distance (ALiBi), in code of its own."""
    model = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1))
    with pytest.raises(UserError, match="BloomForCausalLM runs only with its own attention"):
        use_grouped_attention(model)
    assert model.config._attn_implementation != NAME


def test_the_switch_reaches_the_decoder() -> None:
    model = tiny_model("llama")
    untouched = copy.deepcopy(model)
    use_grouped_attention(model)
    assert model.config._attn_implementation == NAME
    assert model.get_decoder().layers[0].self_attn.config._attn_implementation == NAME
    assert untouched.config._attn_implementation == "sdpa"
