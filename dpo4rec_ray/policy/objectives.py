"""What a training step minimises: DPO on preference pairs, GRPO on groups of scored texts, or the likelihood of texts.

An objective turns rows into a batch and a batch into a sum over its rows, never a mean: the trainer divides by the rows of
the whole step, so that rows may be distributed over micro-batches and workers in any way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dpo4rec_ray.config.training import DPOSection, GRPOSection
from dpo4rec_ray.core.policy_gradient import (
    TOKEN_WEIGHTS,
    Shape,
    clipped_surrogate,
    divergence,
    sums_per_group,
    truncated_importance,
)
from dpo4rec_ray.core.preference import PREFERENCE_LOSSES, Ratios, chosen_nll
from dpo4rec_ray.policy.batch import OnDevice, TokenBatch, collate
from dpo4rec_ray.policy.groups import Group, GroupBatch, apart, collate_groups
from dpo4rec_ray.policy.logps import CompletionLogps

TrainingRow = dict[str, Any]
Metrics = dict[str, float]


@dataclass(frozen=True)
class BatchLayout:
    """How completions become tensors. No choice changes a log-probability beyond rounding."""

    pad_id: int
    prefix_sharing: bool = False
    packing: bool = False
    multiple_of: int = 1

    @property
    def grouped(self) -> bool:
        return self.prefix_sharing or self.packing

    def collate(self, groups: list[Group]) -> TokenBatch | GroupBatch:
        """Completions in the order of the groups."""
        if self.grouped:
            own = groups if self.prefix_sharing else apart(groups)
            return collate_groups(own, self.pad_id, packing=self.packing, multiple_of=self.multiple_of)
        single = apart(groups)
        return collate([one.prompt for one in single], [one.completions[0] for one in single], self.pad_id)


@dataclass
class Batch(OnDevice):
    """A micro-batch: what the model reads, and what the loss needs beside it."""

    tokens: TokenBatch | GroupBatch
    counts: list[int]  # completions per row
    reference: torch.Tensor | None = None  # log-probabilities [S], or [M] of tokens, where they are stored
    weights: torch.Tensor | None = None  # [S] advantages of the completions, or their shares in the loss
    sampler: torch.Tensor | None = (
        None  # [M] log-probabilities of the policy that drew the tokens, where they are stored
    )
    engine: torch.Tensor | None = None  # [M] the engine's own, where they are kept


class SupervisedObjective:
    """Negative log-likelihood of the completions, the mean over each one's tokens.

    Rows: prompt_token_ids, and completion_token_ids, or several `completions` with their `weights`, which add up to 1.
    """

    per_token = False

    def __init__(self, layout: BatchLayout):
        self._layout = layout

    def collate(self, rows: list[TrainingRow]) -> Batch:
        groups = [
            Group(row["prompt_token_ids"], row.get("completions") or [row["completion_token_ids"]])
            for row in rows
        ]
        counts = [len(group.completions) for group in groups]
        weights = [weight for row in rows for weight in row.get("weights", (1.0,))]
        return Batch(self._layout.collate(groups), counts, weights=torch.tensor(weights, dtype=torch.float64))

    def __call__(self, model: Any, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        assert batch.weights is not None
        losses = -model(batch.tokens) / batch.tokens.lengths
        loss = (losses * batch.weights).sum()
        tokens = (batch.tokens.lengths * batch.weights).sum()
        return loss, {"loss": loss.item(), "surprise": loss.item(), "length": tokens.item()}


class DPOObjective:
    """A preference loss against a reference.

    Rows: prompt_token_ids, chosen_token_ids, rejected_token_ids, and chosen_logp, rejected_logp where the reference's
    log-probabilities are stored. Where they are not, the model with its LoRA off is the reference.
    """

    per_token = False

    def __init__(self, layout: BatchLayout, section: DPOSection):
        self._layout, self._section = layout, section

    def collate(self, rows: list[TrainingRow]) -> Batch:
        groups = [pair_group(row) for row in rows]
        reference = None
        if "chosen_logp" in rows[0]:
            stored = [logp for row in rows for logp in (row["chosen_logp"], *row["rejected_logp"])]
            reference = torch.tensor(stored, dtype=torch.float64)
        return Batch(self._layout.collate(groups), [len(group.completions) for group in groups], reference)

    def __call__(self, model: Any, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        policy = model(batch.tokens)
        reference = _reference(model, batch)
        ratios = ratios_of(policy - reference, batch.tokens.lengths, batch.counts)
        section = self._section
        losses = PREFERENCE_LOSSES[section.loss](ratios, section.beta, section.label_smoothing)
        starts = torch.tensor([0, *batch.counts[:-1]]).cumsum(0)
        if section.nll_weight:
            losses = losses + section.nll_weight * chosen_nll(policy[starts], ratios.chosen_length)
        return losses.sum(), self._metrics(ratios, policy.detach(), losses.detach(), starts)

    @torch.no_grad()
    def _metrics(
        self, ratios: Ratios, policy: torch.Tensor, losses: torch.Tensor, starts: torch.Tensor
    ) -> Metrics:
        beta = self._section.beta
        mask = ratios.mask
        per_pair = mask.sum(dim=1)

        def mean(values: torch.Tensor) -> torch.Tensor:
            """[B, K] -> [B], over the rejected texts of each pair."""
            return values.masked_fill(~mask, 0.0).sum(dim=1) / per_pair

        policy_rejected = torch.zeros_like(ratios.rejected)
        others = torch.ones(len(policy), dtype=torch.bool, device=policy.device)
        others[starts] = False
        policy_rejected[mask] = policy[others]
        every = torch.cat([ratios.chosen[:, None], ratios.rejected], dim=1)
        there = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        tokens = torch.cat([ratios.chosen_length[:, None], ratios.rejected_length], dim=1)
        per_token = every / tokens.clamp(min=1)
        # expm1 of a whole text's log-ratio would be infinite beyond 88 nats
        k3 = ((per_token.expm1() - per_token) * tokens).masked_fill(~there, 0.0)
        sums = {
            "loss": losses,
            "chosen_reward": beta * ratios.chosen,
            "rejected_reward": beta * mean(ratios.rejected),
            "margin": beta * mean(ratios.margin),
            "accuracy": mean((ratios.margin > 0).float()),
            "chosen_logp": policy[starts],
            "rejected_logp": mean(policy_rejected),
            # Schulman's k3 estimate of KL(ref || policy), never negative, of each text's mean log-ratio per token; right on
            # average for texts that the reference drew, as in a round's first turn
            "kl_per_token": k3.sum(dim=1) / tokens.masked_fill(~there, 0).sum(dim=1),
            "chosen_length": ratios.chosen_length.float(),
            "rejected_length": mean(ratios.rejected_length.float()),
        }
        names, values = list(sums), torch.stack([value.detach().double().sum() for value in sums.values()])
        return dict(zip(names, values.tolist(), strict=True))


class GRPOObjective:
    """The clipped surrogate with a KL penalty, a row is a user's group of texts (core.policy_gradient).

    Rows: prompt_token_ids, completions, advantages, and log-probabilities of the completions' tokens where they are stored:
    `sampler_logps` of the policy that drew the texts, `reference_logps`, and `engine_logps` as the engine had them. What is not
    stored of the first two is that of the model with its LoRA off.
    """

    per_token = True

    def __init__(
        self, layout: BatchLayout, section: GRPOSection, max_text_tokens: int, *, same_reference: bool = True
    ):
        """
        Args:
            max_text_tokens: most tokens of a text that is sampled, the divisor of token_weights "constant".
            same_reference: the policy that drew the texts is the reference too.
        """
        self._layout, self._section, self._longest = layout, section, max_text_tokens
        self._same_reference = same_reference

    def collate(self, rows: list[TrainingRow]) -> Batch:
        groups = [Group(row["prompt_token_ids"], row["completions"]) for row in rows]

        def stored(name: str) -> torch.Tensor | None:
            if name not in rows[0]:
                return None
            return torch.tensor([logp for row in rows for one in row[name] for logp in one])

        return Batch(
            self._layout.collate(groups),
            [len(group.completions) for group in groups],
            stored("reference_logps"),
            torch.tensor([one for row in rows for one in row["advantages"]], dtype=torch.float64),
            stored("sampler_logps"),
            stored("engine_logps"),
        )

    def _fixed(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[M] log-probabilities of the sampling policy and of the reference; None where nothing is pulled to a reference."""
        sampler = _lora_off(model, batch) if batch.sampler is None else batch.sampler
        if self._same_reference:
            return sampler, sampler
        reads_off = batch.reference is None and self._section.kl_weight > 0
        return sampler, _lora_off(model, batch) if reads_off else batch.reference

    def __call__(self, model: Any, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        assert batch.weights is not None
        policy = model(batch.tokens)
        device = policy.device
        counts = torch.tensor(batch.counts, device=device)
        texts = batch.tokens.sequence_ids
        groups = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
        shape = Shape(texts, groups, batch.tokens.lengths)
        section = self._section
        sampler, reference = self._fixed(model, batch)
        log_ratio = policy - sampler
        losses, clipped = clipped_surrogate(
            log_ratio, batch.weights[texts].to(log_ratio.dtype), section.clip_low, section.clip_high
        )
        if section.sampler == "corrected":
            assert batch.engine is not None
            losses = losses * truncated_importance(sampler - batch.engine, section.importance_cap)
        kl = None
        if reference is not None:
            kl = divergence(log_ratio, reference - policy)
            losses = losses + section.kl_weight * kl
        weights = TOKEN_WEIGHTS[section.token_weights](shape, self._longest)
        loss = sums_per_group(losses, weights, shape).sum()
        with torch.no_grad():
            mean = TOKEN_WEIGHTS["token"](shape, self._longest)
            # The advantage of the policy's texts by importance sampling, of whole texts, normalised within the group.
            of_text = torch.zeros(len(texts.unique()), dtype=torch.float64, device=device)
            of_text.index_add_(0, texts, log_ratio.double())
            shares = _softmax_per_group(of_text, groups, len(counts))
            sums = {
                "loss": loss,
                "gain": (shares * batch.weights).sum(),
                "ratio": (log_ratio.exp().double() * mean).sum(),
                "clip_share": (clipped.double() * mean).sum(),
                # How far the policy has moved from the one that drew the texts
                "off_policy": (divergence(log_ratio, -log_ratio).double() * mean).sum(),
                **({} if kl is None else {"kl_per_token": (kl.double() * mean).sum()}),
                **(
                    {}
                    if batch.engine is None or section.sampler == "engine"
                    else {"engine_gap": ((sampler - batch.engine).abs().double() * mean).sum()}
                ),
                # Minus the mean log-probability of the texts' tokens: the entropy while these are the policy's own
                "surprise": (-policy.double() * mean).sum(),
                "length": (batch.tokens.lengths.double() / counts[groups]).sum(),
            }
            values = torch.stack([value.detach().double() for value in sums.values()]).tolist()
        return loss, dict(zip(sums, values, strict=True))


Objective = SupervisedObjective | DPOObjective | GRPOObjective


def _softmax_per_group(values: torch.Tensor, groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[S] values -> [S], adding up to 1 in each group."""
    most = torch.full((num_groups,), -torch.inf, dtype=values.dtype, device=values.device)
    most = most.scatter_reduce(0, groups, values, "amax")
    shares = (values - most[groups]).exp()
    return shares / torch.zeros_like(most).index_add(0, groups, shares)[groups]


def _reference(model: Any, batch: Batch) -> torch.Tensor:
    """The stored log-probabilities of the reference, or those of the model with its LoRA off."""
    return _lora_off(model, batch) if batch.reference is None else batch.reference


def _lora_off(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad(), _peft(model).disable_adapter():
        return model(batch.tokens)


def pair_group(row: TrainingRow) -> Group:
    """A pair's prompt with its chosen text, then its rejected ones."""
    return Group(row["prompt_token_ids"], [row["chosen_token_ids"], *row["rejected_token_ids"]])


def ratios_of(log_ratios: torch.Tensor, lengths: torch.Tensor, counts: list[int]) -> Ratios:
    """[S] log-ratios and lengths of completions, chosen before rejected in each row -> `Ratios` of B rows.

    counts: completions per row (1 + its rejected).
    """
    most = max(counts) - 1
    sizes = torch.tensor(counts, device=log_ratios.device)
    mask = torch.arange(most, device=log_ratios.device) < (sizes - 1)[:, None]
    starts = sizes.cumsum(0) - sizes
    places = (starts[:, None] + 1 + torch.arange(most, device=log_ratios.device)).clamp(
        max=len(log_ratios) - 1
    )
    return Ratios(
        chosen=log_ratios[starts],
        rejected=log_ratios[places].masked_fill(~mask, 0.0),
        mask=mask,
        chosen_length=lengths[starts],
        rejected_length=lengths[places].masked_fill(~mask, 0),
    )


def _peft(model: Any) -> Any:
    """The peft model inside DeepSpeed's engine and our module."""
    inner = getattr(model, "module", model)
    return inner.model if isinstance(inner, CompletionLogps) else inner
