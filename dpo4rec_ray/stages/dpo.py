"""DPO of round r: policy r-1 trained on the round's pairs, under Ray Train and DeepSpeed ZeRO.

The result is a LoRA folder of peft or, with full fine-tuning, a model folder. For an engine that is faster with whole
weights (vLLM on CPU) the LoRA is merged too. A round that starts from a policy that was not merged merges it first.
"""

from __future__ import annotations

from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.core.pairing import Kind
from dpo4rec_ray.policy.deepspeed_config import read_extra
from dpo4rec_ray.policy.model import PolicyWeights, save_merged, write_policy
from dpo4rec_ray.storage.places import is_complete
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.metrics_file import read_metrics
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.policies import merges_lora, model_identity, policy_weights
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.train.dpo_loop import FULL, KINDS, LORA, MERGED, WARNINGS, DPOTask, dpo_loop
from dpo4rec_ray.train.launch import launch
from dpo4rec_ray.train.reference_logps import cached_reference
from dpo4rec_ray.train.state import begin, read_state, remove_checkpoints
from dpo4rec_ray.workers.tasks import in_worker


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `policy` of the round."""
    section = config.dpo
    folder = begin(store, "policy", round_id)
    before = policy_weights(config, store, round_id - 1)
    continues = section.reference_policy == "base" and round_id > 1
    if continues and section.tuning == "lora":
        base = before.base
    elif before.lora and not before.merged:
        if not is_complete(folder / "start"):  # merged in a worker: the driver may be a small machine
            in_worker(save_merged, before.base, before.lora, folder / "start", config.llm.dtype)
        base = str(folder / "start")
    else:
        base = before.whole
    frozen = policy_weights(config, store, 0).base if section.reference_policy == "base" else base
    reference = None
    if section.reference == "cached":
        reference = str(cached_reference(config, store, round_id, frozen))
    state = read_state(folder)
    if state and state.result:
        remove_checkpoints(section, folder)
    else:
        task = DPOTask(
            config=config,
            store=store,
            round_id=round_id,
            seed=seed_of(config.run.seed, "dpo", round_id),
            base=base,
            lora=before.lora if continues else None,
            reference=reference,
            moved=continues,
            deepspeed=read_extra(section, config.llm.dtype),
        )
        launch(
            dpo_loop,
            {"task": task},
            folder=folder,
            section=section,
            label="dpo",
            unit="steps",
            min_workers=section.min_workers,
        )
    weights = PolicyWeights(base=base, lora=str(folder / LORA))
    if section.tuning == "full":
        weights = PolicyWeights(base=str(folder / FULL))
    elif merges_lora(config):
        weights = PolicyWeights(base=base, lora=weights.lora, merged=str(folder / MERGED))
    stats = _stats(config, store, round_id)
    write_policy(folder, weights, {"base_hash": model_identity(base)})
    pairs = stats["pairs"]
    return Outcome(rows_in=pairs["train"] + pairs["train_too_long"], rows_out=stats["steps"], stats=stats)


def _stats(config: Config, store: RunDir, round_id: int) -> dict[str, Any]:
    """What the workers wrote into the folder, as one table; prints the lines that a user should read."""
    folder, section = store.path("policy", round_id), config.dpo
    steps = read_metrics(folder)
    state = read_state(folder)
    assert state is not None and state.result is not None
    pairs, heldout, max_length = (state.result[key] for key in ("pairs", "heldout", "max_length"))
    losses = state.result["heldout_losses"]
    kept_at = _kept_at(losses)
    warnings = [line for step in steps for line in step.get(WARNINGS, [])]
    by_kind = {kind: heldout.get(f"accuracy_{kind}") for kind in KINDS}
    for kind, accuracy in by_kind.items():
        if accuracy is not None:
            what = "own texts" if kind == Kind.OWN else "another user's text"
            say(
                f"  dpo: accuracy on {pairs[f'valid_{kind}']} held-out pairs with {what} rejected {accuracy:.3f}"
            )
    if kept_at < steps[-1]["step"]:
        say(
            f"  dpo: kept the policy of step {kept_at}; at step {steps[-1]['step']} the held-out loss was higher"
        )
    if too_long := pairs["train_too_long"] + pairs["valid_too_long"]:
        say(f"  dpo: {too_long} pairs are longer than {max_length} tokens and were left out")
    for line in warnings:
        say(f"  dpo: {line}")
    return {
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "accuracy": heldout.get("accuracy"),
        "margin": heldout.get("margin"),
        "heldout_loss": heldout.get("loss"),
        **{f"heldout_accuracy_{kind}": accuracy for kind, accuracy in by_kind.items()},
        "train_accuracy": steps[-1]["accuracy"],
        "kl_per_token": steps[-1]["kl_per_token"],
        "pairs_per_s": steps[-1]["pairs_per_s"],
        "peak_memory_mb": max(step["peak_memory_mb"] for step in steps),
        "steps": len(steps),
        "kept_step": kept_at,
        "reference": "base LLM" if section.reference_policy == "base" else f"policy {round_id - 1}",
        "zero_stage": section.zero_stage,
        "warnings": warnings,
        "pairs": pairs,
        "max_length": max_length,
        "heldout_losses": losses,
        "continued_after": state.continued_after,
    }


def _kept_at(losses: dict[str, float | None]) -> int:
    """The step whose policy was kept: the last one of the lowest held-out loss; the last evaluation without such losses."""
    known = [(loss, -int(step)) for step, loss in losses.items() if loss is not None]
    return -min(known)[1] if known else max(map(int, losses))
