"""log pi(completion | prompt), the only thing that training asks of a model, and three ways to compute it with less work.

Plain: padded rows and the model's own attention and head. Otherwise groups of policy.groups: shared prompts, packed rows,
and a head that is applied to the hidden states which predict completion tokens, a chunk of tokens at a time, so that no
tensor of tokens x vocabulary is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dpo4rec_ray.core.losses import sequence_logps, token_logps
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.attention import NAME, WITHOUT_GROUPS, use_grouped_attention
from dpo4rec_ray.policy.batch import TokenBatch, collate, completion_logits
from dpo4rec_ray.policy.groups import Group, GroupBatch, apart, collate_groups


class CompletionLogps(torch.nn.Module):
    """batch -> log-probabilities of its S completions, EOS included: sums [S] float64, or one per token [M] float32."""

    def __init__(
        self,
        model: Any,
        *,
        grouped: bool = False,
        chunk_tokens: int = 0,
        per_token: bool = False,
        temperature: float = 1.0,
    ):
        """
        Args:
            model: a transformers causal LM, or one with peft's LoRA in it.
            grouped: batches are GroupBatch, else TokenBatch.
            chunk_tokens: completion tokens per application of the head; 0: all at once (grouped only).
            per_token: not summed up, in the order of the completions (`sequence_ids` of the batch).
            temperature: of the distribution: logits are divided by it.

        Raises:
            UserError: grouped, and the model runs only with its own attention.
        """
        super().__init__()
        self.model = model
        self._chunk_tokens, self._per_token, self._temperature = chunk_tokens, per_token, temperature
        inner = bare(model)
        if grouped:
            use_grouped_attention(inner)
        elif inner.config._attn_implementation == "sdpa" and _softcap(inner, "attn"):
            # SDPA has no soft cap, and transformers silently leaves it out (Gemma 2)
            inner.set_attn_implementation("eager")

    def forward(self, batch: TokenBatch | GroupBatch) -> torch.Tensor:
        if isinstance(batch, TokenBatch):
            logits, token_ids, mask = completion_logits(self.model, batch)
            if self._temperature != 1:
                logits = logits.float() / self._temperature
            if self._per_token:
                return token_logps(logits, token_ids, mask)[mask[:, 1:]]
            return sequence_logps(logits, token_ids, mask)
        hidden = (
            bare(self.model)
            .get_decoder()(
                input_ids=batch.token_ids,
                position_ids=batch.layout.positions,
                groups=batch.layout,
                use_cache=False,
            )
            .last_hidden_state
        )
        predicting = hidden.flatten(0, 1)[batch.predictors]  # [M, H]
        logps = self._head(predicting, batch.targets)
        if self._per_token:
            return logps
        sums = logps.new_zeros(len(batch.lengths), dtype=torch.float64)
        return sums.index_add(0, batch.sequence_ids, logps.double())

    def _head(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[M, H], [M] -> log p of the targets [M], float32.

        The head is called once for any M: where weights are partitioned (ZeRO-3), each call of a module is an exchange between
        the workers, and these have different numbers of tokens.
        """
        inner = bare(self.model)
        head = inner.get_output_embeddings()
        curve = Curve(_softcap(inner, "final"), self._temperature)
        if type(head) is not torch.nn.Linear:  # LoRA on the head, or the model's own class
            return _logps(head(hidden), targets, curve)
        own = head.forward
        # called as a module: its hooks gather a partitioned weight, in the backward pass too
        head.forward = lambda states: _linear_logps(head, states, targets, curve, self._chunk_tokens)
        try:
            return head(hidden)
        finally:
            head.forward = own


@dataclass(frozen=True)
class Curve:
    """What becomes of a logit between head and softmax: cap * tanh(logit / cap) where there is a cap, by the temperature."""

    cap: float | None
    temperature: float = 1.0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.cap:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits if self.temperature == 1 else logits / self.temperature

    def slope(self, curved: torch.Tensor) -> torch.Tensor | float:
        """Derivative by the head's logit, from the value after the curve."""
        straight = 1 / self.temperature
        return straight * (1 - (curved * self.temperature / self.cap) ** 2) if self.cap else straight


def _linear_logps(
    head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, curve: Curve, chunk_tokens: int
) -> torch.Tensor:
    """As `CompletionLogps._head`, a chunk of tokens at a time."""
    size = chunk_tokens or len(targets)
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    if not head.weight.requires_grad and head.bias is None:
        return torch.cat([FrozenHead.apply(states, head.weight, ids, curve) for states, ids in chunks])

    def logps(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return _logps(F.linear(states, head.weight, head.bias), ids, curve)

    if chunk_tokens and torch.is_grad_enabled():
        return torch.cat([checkpoint(logps, states, ids, use_reentrant=False) for states, ids in chunks])
    return torch.cat([logps(states, ids) for states, ids in chunks])


class FrozenHead(torch.autograd.Function):
    """log softmax(W h)[target] under a head that is not trained; the gradient is computed in the forward pass.

    d logp / d h = W[target] - softmax(W h) W, one vector per token, is all that backward needs: logits [M, V] exist for one
    chunk only, and nothing is computed twice. (Liger's fused losses do this for a mean; here each token has its weight.)
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, curve: Curve
    ) -> torch.Tensor:
        logits = curve((hidden @ weight.t()).float())
        at_target = logits.gather(1, targets[:, None])
        log_total = logits.logsumexp(dim=1, keepdim=True)
        if ctx.needs_input_grad[0]:
            slope = curve.slope(logits)
            shares = logits.sub_(log_total).exp_()
            if isinstance(slope, float):  # the same everywhere: no copy of the logits
                gradient = slope * (weight[targets] - shares.to(weight.dtype) @ weight)
            else:
                at = slope.gather(1, targets[:, None]).to(weight.dtype)
                gradient = at * weight[targets] - (shares * slope).to(weight.dtype) @ weight
            ctx.save_for_backward(gradient)
        return (at_target - log_total).squeeze(1)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None


def _logps(logits: torch.Tensor, targets: torch.Tensor, curve: Curve) -> torch.Tensor:
    return -F.cross_entropy(curve(logits.float()), targets, reduction="none")


def _softcap(model: Any, of: str) -> float | None:
    """Gemma's bound on the scores of attention ("attn") or of the head ("final"); None: there is none."""
    return getattr(model.config.get_text_config(), f"{of}_logit_softcapping", None)


def bare(model: Any) -> Any:
    """The transformers model inside peft's wrapper, LoRA included; a model without a wrapper as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def check_grouped(model: Any) -> None:
    """Check that log-probabilities can be computed in groups, on the device where the model is.

    Where weights are partitioned (ZeRO-3), every worker must call it, after DeepSpeed has placed its hooks in the model.

    Compares two packed groups with the plain path: some models scale their head's logits, some add to attention what
    `grouped_attention` leaves out (sinks), some mix neighbouring tokens outside of it (convolutions, state spaces).

    Raises:
        UserError: the model runs only with its own attention, or its log-probabilities differ.
    """
    inner = bare(model)
    size = inner.config.get_text_config().vocab_size
    ids = (torch.arange(48) * 7919 % size).tolist()
    groups = [Group(ids[:10], [ids[10:18], ids[18:24]]), Group(ids[24:32], [ids[32:40], ids[40:48]])]
    alone = apart(groups)
    padded = collate([one.prompt for one in alone], [one.completions[0] for one in alone], pad_id=0)
    own, training = inner.config._attn_implementation, inner.training
    if own == NAME:
        inner.set_attn_implementation("eager")
    inner.eval()
    try:
        plain = CompletionLogps(inner)(padded.to(inner.device))
        grouped = CompletionLogps(inner, grouped=True)(
            collate_groups(groups, 0, packing=True, multiple_of=128 if inner.device.type == "cuda" else 1).to(
                inner.device
            )
        )
    finally:
        inner.train(training)
        inner.set_attn_implementation(own)
    difference = ((grouped - plain) / plain).abs().max().item()
    # a wrong computation is wrong by percents; half precision rounds to .4 %, and sums to .1 %
    if not difference <= (1e-4 if inner.dtype == torch.float32 else 2e-2):
        raise UserError(
            f"{type(inner).__name__} gives different log-probabilities in groups (by up to {difference:.2%}); "
            f"{WITHOUT_GROUPS}"
        )
