"""Training of the LLM: of the policy by one of three objectives, and of the small LLM from scratch. One trainer runs all."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dpo4rec_ray.config.placed import GPUs, Placed
from dpo4rec_ray.config.section import Section


class TrainerSection(Placed):
    """What both trainings share."""

    placement = Placed.placement | {"cpus_per_worker", "gpus_per_worker", "checkpoint_every", "max_failures",
                                    "storage_path"}  # fmt: skip
    lr: float = Field(default=5e-5, gt=0)
    """Learning rate (AdamW)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up; cosine and linear end at 0."""
    epochs: int = Field(default=3, ge=1)
    """Epochs."""
    batch_size: int = Field(default=2, ge=1)
    """Rows (pairs or texts) per worker and micro-step."""
    gradient_accumulation_steps: int = Field(default=8, ge=1)
    """Micro-steps per optimiser step."""
    warmup_frac: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps with a rising learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    num_workers: int = Field(default=2, ge=1)
    """Data-parallel workers."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs of a worker."""
    gpus_per_worker: GPUs = 0
    """GPUs of a worker. 0: CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: what workers share out. 1: optimiser states. 2: gradients too. 3: weights too."""
    offload_optimizer: bool = False
    """Keep optimiser states in the CPU's memory."""
    offload_params: bool = False
    """Keep the shared weights in the CPU's memory (zero_stage 3)."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    deepspeed: str = ""
    """JSON file that is merged over the DeepSpeed config that these keys make."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Optimiser steps between checkpoints. A killed worker goes on from the last one."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts of the workers, each from the last checkpoint."""
    storage_path: str = ""
    """Folder or URI (s3://...) of the checkpoints, on storage that all nodes see. "": in the run folder."""

    @property
    def global_batch_size(self) -> int:
        """Rows per optimiser step, over all workers."""
        return self.batch_size * self.gradient_accumulation_steps * self.num_workers

    @property
    def on_gpu(self) -> bool:
        """Whether workers train on GPUs."""
        return self.gpus_per_worker > 0

    @model_validator(mode="after")
    def _offloadable(self) -> TrainerSection:
        if self.offload_params and self.zero_stage != 3:
            raise ValueError("offload_params needs zero_stage = 3")
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer needs zero_stage = 1 or more")
        return self


class PolicySection(TrainerSection):
    """Training of the LLM on what the recommender thinks of its texts (docs/method.md, section 5)."""

    placement = TrainerSection.placement | {"min_workers", "max_kl_per_token"}
    objective: str | tuple[str, ...] = "dpo"
    """What is learned from scored texts: dpo (preference pairs), best_of_n (each user's best texts) or grpo (all texts). A list
    is by turn, such as ["best_of_n", "dpo"]; its last one holds for the turns that follow."""
    reference: Literal["cached", "lora_off"] = "cached"
    """Where the reference's log-probabilities come from. "cached": computed once, stored beside the pairs. "lora_off": from the
    model in training with its LoRA off, at every step."""
    reference_policy: Literal["previous", "turn", "base"] = "previous"
    """The reference of DPO and GRPO. "previous": the policy that the round began with. "turn": the one that the turn began with.
    "base": the base LLM."""
    tuning: Literal["lora", "full"] = "lora"
    """Train a LoRA, or all weights."""
    lora_rank: int = Field(default=16, ge=1, le=512)
    """Rank of the LoRA; vLLM serves none above 512."""
    lora_alpha: int = Field(default=32, ge=1)
    """Alpha of the LoRA: it is scaled by alpha / rank."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the LoRA."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Modules that get a LoRA: "all-linear", or names such as q_proj, v_proj."""
    lora_init: str = "default"
    """First weights of the LoRA: "default" or "gaussian". Both start at exactly the base model."""
    quantize: Literal["none", "4bit"] = "none"
    """"4bit" is QLoRA: the frozen base in 4 bits (bitsandbytes, GPU)."""
    max_length: int = Field(default=0, ge=0)
    """Most tokens of prompt and text; longer pairs are left out. 0: llm.max_model_len."""
    # What a step costs. None of the next four changes a pair's loss beyond rounding; length_sorted changes which pairs meet.
    prefix_sharing: bool = True
    """Texts of a pair share one pass over their prompt."""
    packing: bool = True
    """Pairs of a micro-batch lie in one row, without padding."""
    length_sorted: bool = True
    """Pairs of similar length meet in a step."""
    chunk_tokens: int = Field(default=512, ge=0)
    """Tokens whose logits are held at the same time. 0: all of a micro-batch."""
    max_heldout_users: int = Field(default=1000, ge=0)
    """Most validation users, drawn at random, whose texts the training is evaluated on. The accuracy of 1,000 pairs
    is known to 3 %. 0: all."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on the held-out users; the policy of the lowest loss is kept. 0: at the end of every epoch."""
    patience: int = Field(default=1, ge=0)
    """Evaluations without a lower held-out loss before training stops. 0: never. Without held-out pairs it never stops."""
    max_kl_per_token: float = Field(default=0.5, gt=0)
    """KL to the reference per token above which a warning is printed."""
    min_workers: int = Field(default=0, ge=0)
    """Least number of workers to go on with when a node is lost. 0: num_workers."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """All that it learns by."""
        return self.objective if isinstance(self.objective, tuple) else (self.objective,)

    def objective_of(self, turn: int) -> str:
        """By which the policy of a turn, counted from 1, is trained."""
        return self.objectives[min(turn, len(self.objectives)) - 1]

    @model_validator(mode="after")
    def _consistent(self) -> PolicySection:
        if not self.objectives:
            raise ValueError("objective = []: name one at least")
        if self.lora_init not in ("default", "gaussian"):
            raise ValueError(
                f"lora_init = {self.lora_init!r} changes the base weights, so that the saved LoRA alone would not be the "
                'policy; use "default" or "gaussian"'
            )
        if self.tuning == "full" and self.reference == "lora_off":
            raise ValueError('tuning = "full" has no LoRA to switch off; use reference = "cached"')
        if self.tuning == "full" and self.quantize != "none":
            raise ValueError('quantize needs tuning = "lora": 4-bit weights are not trained')
        if self.quantize != "none" and (not self.gpus_per_worker or self.zero_stage == 3):
            raise ValueError("quantize needs gpus_per_worker > 0 and zero_stage below 3")
        if self.min_workers > self.num_workers:
            raise ValueError(f"min_workers = {self.min_workers} is above num_workers = {self.num_workers}")
        if 0 < self.min_workers < self.num_workers and self.zero_stage:
            raise ValueError(
                "min_workers below num_workers needs zero_stage = 0: checkpoints of the others belong to one number of workers"
            )
        return self


class DPOSection(Section):
    """Direct preference optimisation: policy.objective = "dpo" (docs/method.md, section 5)."""

    beta: float = Field(default=0.01, gt=0)
    """Beta of the DPO loss."""
    loss: str = "sigmoid"
    """Preference loss: sigmoid, robust, ipo (sums over tokens), ipo_norm and sigmoid_norm (means), hinge, or softmax, which takes
    several rejected texts."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Label smoothing of sigmoid (then cDPO), sigmoid_norm and robust."""
    nll_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen texts' negative log-likelihood per token, added to the loss."""


class BestOfNSection(Section):
    """Supervised training on each user's best texts: policy.objective = "best_of_n" (RAFT, arXiv 2304.06767)."""

    top: int = Field(default=1, ge=1)
    """Most texts per user; never more than half of the distinct ones."""
    min_margin: float = Field(default=0.0, ge=0)
    """Least distance of a text's reward from the mean of the user's texts."""
    reward_temperature: float = Field(default=0.0, ge=0)
    """A user's texts are weighted by softmax(reward / reward_temperature). 0: all the same."""


class GRPOSection(Section):
    """Group relative policy optimisation: policy.objective = "grpo" (arXiv 2402.03300)."""

    scale: Literal["std", "none"] = "std"
    """Advantages are a user's rewards minus their mean. "std": by their standard deviation. "none": as they are (Dr. GRPO)."""
    clip_low: float = Field(default=0.2, gt=0, le=1)
    """A token's ratio to the sampling policy is clipped at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """A token's ratio is clipped at 1 + clip_high. Above clip_low: rare tokens may grow faster (DAPO)."""
    kl_weight: float = Field(default=0.04, ge=0)
    """Weight of the KL divergence to the reference per token (k3 estimate). 0: none."""
    sampler: Literal["trainer", "corrected", "engine"] = "trainer"
    """Whose log-probabilities the ratio is to. "trainer": the sampling policy's, computed once more. "corrected": the same, each
    token weighted by trainer's over engine's probability (truncated importance sampling). "engine": the engine's own, which
    saves a pass. The last two need generate.token_logps."""
    importance_cap: float = Field(default=2.0, ge=1)
    """The most that sampler = "corrected" weighs a token with."""
    token_weights: str = "sequence"
    """"sequence": mean over each text's tokens, then over texts. "token": mean over all tokens of a user's texts. "constant": sum
    over tokens by generate.max_new_tokens (Dr. GRPO), which favours no length."""


class BootstrapSection(TrainerSection):
    """The small LLM that is trained from scratch, for llm.path = "bootstrap"."""

    lr: float = Field(default=3e-3, gt=0)
    """Learning rate (AdamW)."""
    epochs: int = Field(default=1, ge=1)
    """Epochs."""
    batch_size: int = Field(default=32, ge=1)
    """Texts per worker and micro-step."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-steps per optimiser step."""
    num_users: int = Field(default=60000, ge=100)
    """Simulated users, with one prompt and one text each."""
    hidden_size: int = Field(default=128, ge=32)
    """Width of the model."""
    num_layers: int = Field(default=2, ge=1)
    """Layers of the model."""
