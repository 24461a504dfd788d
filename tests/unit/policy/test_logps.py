"""Shared prompts, packed rows and a chunked head against the plain path, in float32, for every family."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from dpo4rec_ray.config.training import PolicySection
from dpo4rec_ray.core.losses import sequence_logps
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.attention import NAME
from dpo4rec_ray.policy.batch import TokenBatch, collate, completion_logits
from dpo4rec_ray.policy.groups import Group, GroupBatch, apart, collate_groups
from dpo4rec_ray.policy.logps import CompletionLogps, Curve, FrozenHead, bare, check_grouped
from dpo4rec_ray.policy.model import add_lora
from tests.families import FAMILIES, VOCABULARY, WINDOW, tiny_model

TOLERANCE = 1e-5


def draw_groups(seed: int, *shapes: tuple[int, ...]) -> list[Group]:
    """A group per shape (prompt, completion, ...), each a number of tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [Group(tokens(prompt), [tokens(length) for length in lengths]) for prompt, *lengths in shapes]


# k = 3, 1, 2 completions; all but one sequence are longer than the window of 8
GROUPS = draw_groups(1, (11, 9, 1, 14), (6, 17), (1, 3, 12))
NUM_COMPLETIONS = sum(len(group.completions) for group in GROUPS)


def plain_batch(groups: list[Group]) -> TokenBatch:
    alone = apart(groups)
    return collate([one.prompt for one in alone], [one.completions[0] for one in alone], pad_id=0)


@functools.cache
def _start(family: str, lora: bool) -> Any:
    model = tiny_model(family)
    if not lora:
        return model
    adapted = add_lora(model, PolicySection(lora_rank=4, lora_alpha=8))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # at zero, as it starts, lora_A would have no gradient
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted


def start(family: str, lora: bool) -> Any:
    """A copy of the family's model, with a LoRA that changes it or trained in full: paths switch a model in place."""
    return copy.deepcopy(_start(family, lora))


@dataclass
class Answer:
    """Log-probabilities of completions, and the gradients of their weighted sum."""

    logps: torch.Tensor  # [S]
    gradients: dict[str, torch.Tensor]

    def assert_equals(self, other: Answer) -> None:
        torch.testing.assert_close(self.logps, other.logps, rtol=TOLERANCE, atol=0)
        assert self.gradients.keys() == other.gradients.keys()
        largest = max(gradient.abs().max().item() for gradient in other.gradients.values())
        for name, gradient in other.gradients.items():
            difference = (self.gradients[name] - gradient).abs().max().item()
            assert difference <= TOLERANCE * largest, f"{name}: off by {difference / largest:.2g}"


def ask(logps: CompletionLogps, batch: TokenBatch | GroupBatch) -> Answer:
    """Completions weigh differently, so that a mix-up of two shows in the gradients."""
    values = logps(batch)
    assert values.dtype == torch.float64
    weights = torch.linspace(-1.0, 2.0, len(values))
    (values * weights).sum().backward()
    gradients = {
        name: parameter.grad
        for name, parameter in logps.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    return Answer(values.detach(), gradients)


@functools.cache
def plain(family: str, lora: bool) -> Answer:
    return ask(CompletionLogps(start(family, lora)), plain_batch(GROUPS))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_path_moves_every_weight(family: str, lora: bool) -> None:
    """What the others are compared with is no row of zeros: each trained tensor has a gradient, each completion its value."""
    answer, model = plain(family, lora), start(family, lora)
    assert len(answer.gradients) == sum(parameter.requires_grad for parameter in model.parameters())
    assert all("lora" in name for name in answer.gradients) == lora
    largest = max(gradient.abs().max().item() for gradient in answer.gradients.values())
    assert all(gradient.abs().max().item() > 1e-3 * largest for gradient in answer.gradients.values())
    assert len(answer.logps.unique()) == NUM_COMPLETIONS


@pytest.mark.parametrize("chunk_tokens", [0, 7])
@pytest.mark.parametrize("sharing", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_equals_the_plain_one(
    family: str, lora: bool, packing: bool, sharing: bool, chunk_tokens: int
) -> None:
    groups = GROUPS if sharing else apart(GROUPS)
    batch = collate_groups(groups, 0, packing=packing, multiple_of=4)
    logps = CompletionLogps(start(family, lora), grouped=True, chunk_tokens=chunk_tokens)
    ask(logps, batch).assert_equals(plain(family, lora))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_nothing(family: str, lora: bool) -> None:
    """Each decoder layer runs a second time in the backward pass, with the same groups."""
    model = start(family, lora)
    bare(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    calls = Counter[int]()
    for number, layer in enumerate(bare(model).get_decoder().layers):
        layer.self_attn.register_forward_hook(lambda *_, n=number: calls.update([n]))
    logps = CompletionLogps(model, grouped=True, chunk_tokens=7)
    answer = ask(logps, collate_groups(GROUPS, 0, packing=True))
    assert calls == {0: 2, 1: 2}
    answer.assert_equals(plain(family, lora))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_head_is_called_once_whatever_the_chunks(lora: bool) -> None:
    """Under ZeRO-3 a call is an exchange between workers, which have different numbers of tokens."""
    model = start("llama", lora)
    head = bare(model).get_output_embeddings()
    calls = Counter[str]()
    head.register_forward_hook(lambda *_: calls.update(["head"]))
    logps = CompletionLogps(model, grouped=True, chunk_tokens=3)
    answer = ask(logps, collate_groups(GROUPS, 0, packing=True))
    assert calls["head"] == 1
    answer.assert_equals(plain("llama", lora))
    hidden = torch.ones(1, 2, head.in_features)
    torch.testing.assert_close(head(hidden), hidden @ head.weight.t())  # and is itself again


@torch.no_grad()
def logps_of(logps: CompletionLogps, groups: list[Group], **layout: Any) -> torch.Tensor:
    return logps(collate_groups(groups, layout.pop("pad_id", 0), **{"packing": True, **layout}))


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_do_not_see_each_other(family: str, packing: bool) -> None:
    """Another token in the middle of one completion moves that completion only; in a prompt, those of its group."""
    logps = CompletionLogps(start(family, lora=False), grouped=True)
    before = logps_of(logps, GROUPS, packing=packing)
    for changed in range(len(GROUPS[0].completions)):
        completions = [list(one) for one in GROUPS[0].completions]
        completions[changed][len(completions[changed]) // 2] ^= 1
        after = logps_of(logps, [Group(GROUPS[0].prompt, completions), *GROUPS[1:]], packing=packing)
        moved = (after - before).abs() > 1e-4
        assert moved.nonzero().flatten().tolist() == [changed]
        torch.testing.assert_close(after[~moved], before[~moved], rtol=1e-6, atol=0)
    prompt = [*GROUPS[0].prompt[:-1], GROUPS[0].prompt[-1] ^ 1]
    after = logps_of(logps, [Group(prompt, GROUPS[0].completions), *GROUPS[1:]], packing=packing)
    assert ((after - before).abs() > 1e-4).tolist() == [True] * 3 + [False] * 3
    torch.testing.assert_close(after[3:], before[3:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_order_and_padding_do_not_matter(family: str) -> None:
    """Groups in another order, completions in another order, other padding: each completion keeps its value."""
    logps = CompletionLogps(start(family, lora=False), grouped=True)
    before = logps_of(logps, GROUPS)
    turned = logps_of(logps, GROUPS[::-1])
    torch.testing.assert_close(torch.cat([turned[3:], turned[2:3], turned[:2]]), before, rtol=1e-6, atol=0)
    mirrored = [Group(group.prompt, group.completions[::-1]) for group in GROUPS]
    torch.testing.assert_close(logps_of(logps, mirrored)[[2, 1, 0, 3, 5, 4]], before, rtol=1e-6, atol=0)
    for packing in (False, True):
        for pad_id in (0, 63):
            padded = logps_of(logps, GROUPS, packing=packing, pad_id=pad_id, multiple_of=32)
            torch.testing.assert_close(padded, before, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mistral-window", "sliding_window"),
        ("gemma2", "sliding_window"),
        ("gemma2", "attn_logit_softcapping"),
        ("gemma2", "final_logit_softcapping"),
        ("gemma3", "sliding_window"),
    ],
)
def test_windows_and_soft_caps_are_felt(family: str, name: str) -> None:
    """Without, other values: the comparisons above compare something."""
    (longest,) = draw_groups(2, (2 * WINDOW, 2 * WINDOW))
    whole = logps_of(CompletionLogps(start(family, lora=False), grouped=True), [longest])
    model = start(family, lora=False)
    for part in (model.config, *(layer.self_attn for layer in model.get_decoder().layers)):
        setattr(part, name, None)
    without = logps_of(CompletionLogps(model, grouped=True), [longest])
    assert (without - whole).abs().item() > 0.1


def reference_head(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, curve: Curve
) -> torch.Tensor:
    """The same by torch's own log_softmax and autograd."""
    logits = hidden @ weight.t()
    if curve.cap:
        logits = curve.cap * torch.tanh(logits / curve.cap)
    return (logits / curve.temperature).log_softmax(dim=1)[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("curve", [Curve(None), Curve(3.0), Curve(None, 0.7), Curve(3.0, 0.7)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_frozen_head_equals_autograd(curve: Curve, dtype: torch.dtype, tolerance: float) -> None:
    """Values and gradients against float64; in bfloat16 to its 3 digits. Each token weighs otherwise."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=generator).to(dtype)
    weight = torch.randn(33, 16, generator=generator).to(dtype)
    targets = torch.randint(0, 33, (9,), generator=generator)
    upstream = torch.linspace(-2.0, 3.0, 9)
    exact = hidden.double().requires_grad_()
    expected = reference_head(exact, weight.double(), targets, curve)
    expected.backward(upstream.double())
    hidden.requires_grad_()
    found = FrozenHead.apply(hidden, weight, targets, curve)
    assert found is not None and found.dtype == torch.float32
    found.backward(upstream)
    assert exact.grad is not None and hidden.grad is not None and hidden.grad.dtype == dtype
    for ours, theirs in ((found, expected), (hidden.grad, exact.grad)):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * scale)
    with torch.no_grad():
        assert torch.equal(FrozenHead.apply(hidden, weight, targets, curve), found)


def test_frozen_head_passes_gradcheck_by_differences() -> None:
    """By finite differences of its own values, so that nothing of torch's autograd is trusted."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, generator=generator)
    weight = torch.randn(7, 4, generator=generator)
    targets = torch.tensor([0, 6, 3])
    for curve in (Curve(None), Curve(1.5), Curve(1.5, 0.8)):
        states = hidden.clone().requires_grad_()
        FrozenHead.apply(states, weight, targets, curve).sum().backward()
        assert states.grad is not None
        step = 1e-2
        for place in range(states.numel()):
            ends = []
            for sign in (1, -1):
                moved = hidden.clone()
                moved.view(-1)[place] += sign * step
                ends.append(FrozenHead.apply(moved, weight, targets, curve).sum().item())
            slope = (ends[0] - ends[1]) / (2 * step)
            assert states.grad.view(-1)[place].item() == pytest.approx(slope, abs=2e-3)


class LargestLogits(TorchDispatchMode):
    """Most rows of any floating-point tensor [.., V] that an operation makes while this is on, the backward pass included."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if (
                torch.is_tensor(one)
                and one.is_floating_point()
                and one.ndim
                and one.shape[-1] == self.vocabulary
            ):
                self.rows = max(self.rows, one.numel() // self.vocabulary)
        return result


@contextmanager
def saved_logits(vocabulary: int) -> Iterator[list[int]]:
    """Rows of each tensor [.., V] that autograd keeps for the backward pass."""
    rows: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim and tensor.shape[-1] == vocabulary:
            rows.append(tensor.numel() // vocabulary)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield rows


WIDE = 4099  # a vocabulary that no other size of the model equals
LONG = draw_groups(3, (20, 90, 60), (10, 50))
NUM_TOKENS = 200


def wide_model(lora: bool) -> Any:
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.vocab_size = WIDE
    model = transformers.LlamaForCausalLM(config)
    return add_lora(model, PolicySection(lora_rank=4, lora_alpha=8)) if lora else model


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["trained head", "frozen head"])
def test_no_tensor_of_tokens_by_vocabulary(lora: bool, checkpointing: bool) -> None:
    """200 completion tokens in chunks of 64: logits exist for 64 at most, and none waits for the backward pass."""
    model = wide_model(lora)
    if checkpointing:
        bare(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    logps = CompletionLogps(model, grouped=True, chunk_tokens=64)
    batch = collate_groups(LONG, 0, packing=True)
    assert len(batch.targets) == NUM_TOKENS
    with LargestLogits(WIDE) as largest, saved_logits(WIDE) as saved:
        logps(batch).sum().backward()
    # the head's weight [V, H] is transposed in the product, and its gradient is as large: [H, V] is 32 rows
    assert largest.rows == 64
    assert sum(rows for rows in saved if rows != model.config.hidden_size) == 0


@pytest.mark.parametrize("lora", [False, True], ids=["trained head", "frozen head"])
def test_without_chunks_there_is_one(lora: bool) -> None:
    """What the test above would see; a frozen head keeps none even so."""
    logps = CompletionLogps(wide_model(lora), grouped=True)
    with LargestLogits(WIDE) as largest, saved_logits(WIDE) as saved:
        logps(collate_groups(LONG, 0, packing=True)).sum().backward()
    assert largest.rows == NUM_TOKENS
    assert (NUM_TOKENS in saved) == (not lora)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_check_grouped_lets_the_families_pass(family: str, lora: bool) -> None:
    model = start(family, lora)
    attention = bare(model).config._attn_implementation
    check_grouped(model)
    assert bare(model).config._attn_implementation == attention


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        transformers.GraniteConfig(**SIZES, logits_scaling=8.0),
        transformers.CohereConfig(**SIZES, logit_scale=0.0625),
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2),
        # short convolutions run over neighbours: what a completion sees is not attention's to say
        transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
        # a learned sink takes a share of every softmax
        transformers.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
        # its decoder is not parted from its head
        transformers.Llama4TextConfig(**SIZES, intermediate_size_mlp=48, head_dim=8, num_local_experts=2),
    ],
    ids=lambda config: config.model_type,
)
def test_check_grouped_refuses_what_it_cannot_compute(config: Any) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(UserError, match="prefix_sharing = false"):
        check_grouped(model)
    assert model.config._attn_implementation != NAME


def test_the_plain_path_keeps_gemma_2s_soft_cap() -> None:
    """transformers' SDPA, its default, leaves it out without a word; its own eager attention does not."""
    model, batch = start("gemma2", lora=False), plain_batch(GROUPS)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        dropped = sequence_logps(*completion_logits(model, batch))
        found = CompletionLogps(model)(batch)
        eager = start("gemma2", lora=False)
        eager.set_attn_implementation("eager")
        torch.testing.assert_close(found, sequence_logps(*completion_logits(eager, batch)))
    assert (found - dropped).abs().max().item() > 0.5


def test_check_grouped_refuses_what_is_not_a_number() -> None:
    model = start("llama", lora=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(UserError, match="by up to nan"):
        check_grouped(model)
