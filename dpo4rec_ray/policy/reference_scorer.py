"""Log-probabilities of texts under the reference, computed once, so that training holds one model and runs it once a step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dpo4rec_ray.config.training import PolicySection
from dpo4rec_ray.policy.groups import Group
from dpo4rec_ray.policy.logps import CompletionLogps, check_grouped
from dpo4rec_ray.policy.model import load_lora, load_model, load_tokenizer
from dpo4rec_ray.policy.objectives import BatchLayout

# Tokens of one forward pass. Without gradients only the hidden states of one layer are in memory.
TOKENS_AT_ONCE = 4096


class ReferenceScorer:
    """Groups -> log-probabilities of their completions, in the groups' order."""

    def __init__(
        self,
        model: str,
        dtype: str,
        section: PolicySection,
        *,
        per_token: bool = False,
        temperature: float = 1.0,
        lora: str | None = None,
    ):
        """model: folder or hub name of the reference; dtype: of its weights; lora: on it; the others as in `CompletionLogps`."""
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._layout = layout = batch_layout(model, section)
        self._per_token = per_token
        inner: Any = load_model(model, dtype, quantize=section.quantize)
        if lora:
            inner = load_lora(inner, lora)
        self._lora_off = inner.disable_adapter if lora else contextlib.nullcontext
        inner = inner.eval()
        if section.quantize == "none":  # quantized weights are on the GPU already
            inner = inner.to(self._device)
        if layout.grouped:
            check_grouped(inner)
        self._model = CompletionLogps(
            inner,
            grouped=layout.grouped,
            chunk_tokens=section.chunk_tokens,
            per_token=per_token,
            temperature=temperature,
        )

    def __call__(
        self, groups: Sequence[Group], *, lora: bool = True
    ) -> list[list[float]] | list[list[list[float]]]:
        """Of each group: one number per completion, or per completion one number per token. lora: whether the LoRA counts."""
        with torch.no_grad(), contextlib.nullcontext() if lora else self._lora_off():
            return self._scored(groups)

    def _scored(self, groups: Sequence[Group]) -> list[list[float]] | list[list[list[float]]]:
        found: list[list[float]] = [[] for _ in groups]
        total = np.array([group.num_tokens for group in groups])
        order = np.argsort(-total, kind="stable")
        place = 0
        while place < len(order):
            count = max(1, TOKENS_AT_ONCE // max(1, int(total[order[place]])))
            own = order[place : place + count].tolist()
            logps = self._model(self._layout.collate([groups[i] for i in own]).to(self._device)).tolist()
            for i in own:
                sizes = [len(one) for one in groups[i].completions] if self._per_token else None
                size = sum(sizes) if sizes else len(groups[i].completions)
                mine, logps = logps[:size], logps[size:]
                found[i] = _split(mine, sizes) if sizes else mine
            place += count
        return found


def _split(values: list[float], sizes: list[int]) -> list[list[float]]:
    ends = np.cumsum(sizes).tolist()
    return [values[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def batch_layout(tokenizer_path: str, section: PolicySection) -> BatchLayout:
    """The layout that the recipe's switches ask for. FlexAttention's kernels need whole blocks of 128 tokens."""
    pad_id = load_tokenizer(tokenizer_path).pad_token_id
    multiple_of = 128 if section.on_gpu else 1
    return BatchLayout(pad_id or 0, section.prefix_sharing, section.packing, multiple_of)
