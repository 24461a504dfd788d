"""The reference's log-probabilities of all pairs, computed once, so that training holds one model and runs it once a step."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from dpo4rec_ray.config.training import DPOSection
from dpo4rec_ray.policy.logps import CompletionLogps, check_grouped
from dpo4rec_ray.policy.model import load_model, load_tokenizer
from dpo4rec_ray.policy.objectives import BatchLayout, pair_group
from dpo4rec_ray.policy.rows import ArrowRows, pair_lengths

# Tokens of one forward pass. Without gradients only the hidden states of one layer are in memory.
TOKENS_AT_ONCE = 4096


class ReferenceScorer:
    """pairs -> log pi_ref of their texts, in the pairs' order."""

    def __init__(self, model: str, dtype: str, section: DPOSection):
        """model: folder or hub name of the reference; dtype: of its weights."""
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._layout = layout = batch_layout(model, section)
        inner = load_model(model, dtype, quantize=section.quantize).eval()
        if section.quantize == "none":  # quantized weights are on the GPU already
            inner = inner.to(self._device)
        if layout.grouped:
            check_grouped(inner)
        self._model = CompletionLogps(inner, grouped=layout.grouped, chunk_tokens=section.chunk_tokens)

    @torch.no_grad()
    def __call__(self, pairs: pa.Table) -> pa.Table:
        """A `pairs` table -> a `reference_logps` table."""
        rows, (total, _) = ArrowRows(pairs), pair_lengths(pairs)
        found: list[list[float]] = [[] for _ in range(len(rows))]
        order = np.argsort(-total, kind="stable")
        place = 0
        while place < len(order):
            count = max(1, TOKENS_AT_ONCE // max(1, int(total[order[place]])))
            own = order[place : place + count].tolist()
            groups = [pair_group(rows[i]) for i in own]
            logps = self._model(self._layout.collate(groups).to(self._device)).tolist()
            for i, group in zip(own, groups, strict=True):
                size = len(group.completions)
                found[i], logps = logps[:size], logps[size:]
            place += count
        return pa.table(
            {
                "user_id": pairs["user_id"],
                "chosen_logp": pa.array([one[0] for one in found], pa.float64()),
                "rejected_logp": pa.array([one[1:] for one in found], pa.list_(pa.float64())),
            }
        )


def batch_layout(tokenizer_path: str, section: DPOSection) -> BatchLayout:
    """The layout that the recipe's switches ask for. FlexAttention's kernels need whole blocks of 128 tokens."""
    pad_id = load_tokenizer(tokenizer_path).pad_token_id
    multiple_of = 128 if section.on_gpu else 1
    return BatchLayout(pad_id or 0, section.prefix_sharing, section.packing, multiple_of)
