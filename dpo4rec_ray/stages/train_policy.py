"""Round r's training of the LLM: policy r-1 learns from the round's scored texts, under Ray Train and DeepSpeed ZeRO.

The stage goes by the name of what is learned, policy.objective (train.learners).

The result is a LoRA folder of peft or, with full fine-tuning, a model folder. For an engine that is faster with whole
weights (vLLM on CPU) the LoRA is merged too. A round that starts from a policy that was not merged merges it first.
"""

from __future__ import annotations

from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.policy.deepspeed_config import read_extra
from dpo4rec_ray.policy.model import FULL, LORA, MERGED, PolicyWeights, save_merged, write_policy
from dpo4rec_ray.storage.places import is_complete
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.metrics_file import read_metrics
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.policies import merges_lora, model_identity, policy_weights
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.train.dpo import KINDS
from dpo4rec_ray.train.launch import launch
from dpo4rec_ray.train.learners import LEARNERS
from dpo4rec_ray.train.policy_loop import WARNINGS, policy_loop
from dpo4rec_ray.train.policy_task import PolicyTask
from dpo4rec_ray.train.reference_logps import StoredPolicy, cached_reference
from dpo4rec_ray.train.state import begin, read_state, remove_checkpoints
from dpo4rec_ray.workers.tasks import in_worker


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `policy` of the round."""
    section, objective = config.policy, config.policy.objective_of(round_id)
    learner = LEARNERS[objective]
    temperature = learner.temperature(config, round_id)
    folder = begin(store, "policy", round_id)
    before = policy_weights(config, store, round_id - 1)
    # A policy that is not the reference is trained on from where it is: its LoRA is one on the reference.
    moved = config.reference_of(round_id) != round_id - 1
    base = base_of(before, section.tuning, moved)
    if not base:
        base = str(folder / "start")
        if not is_complete(folder / "start"):  # merged in a worker: the driver may be a small machine
            in_worker(save_merged, before.base, before.lora, folder / "start", config.llm.dtype)
    state = read_state(folder)
    if state and state.result:
        remove_checkpoints(section, folder)
    else:
        stores_reference, stores_sampler = learner.stored(config, moved)
        stored: dict[str, StoredPolicy] = {}
        if learner.texts and stores_reference:
            frozen = base
            if moved and section.tuning == "full":
                frozen = policy_weights(config, store, config.reference_of(round_id)).whole
            stored["reference"] = StoredPolicy(frozen)
        if learner.texts and stores_sampler:
            # As training starts from them: quantised, a merged folder would be other weights.
            stored["sampler"] = StoredPolicy(before.base, before.lora or None)
        folders: dict[str, str] = {}
        if learner.texts and stored:
            made = cached_reference(
                config, store, round_id, list(stored.values()), learner.texts, temperature
            )
            folders = dict(zip(stored, map(str, made), strict=True))
        task = PolicyTask(
            config=config,
            store=store,
            round_id=round_id,
            seed=seed_of(config.run.seed, objective, round_id),
            base=base,
            lora=before.lora if moved and section.tuning == "lora" else None,
            reference=folders.get("reference"),
            sampler=folders.get("sampler"),
            moved=moved,
            temperature=temperature,
            deepspeed=read_extra(section, config.llm.dtype),
        )
        launch(
            policy_loop,
            {"task": task},
            folder=folder,
            section=section,
            label=objective,
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
    rows = stats["rows"]
    return Outcome(rows_in=rows["train"] + rows["train_too_long"], rows_out=stats["steps"], stats=stats)


def base_of(before: PolicyWeights, tuning: str, moved: bool) -> str:
    """The model that training starts from; "" where the LoRA of the policy before has to be merged first.

    moved: the policy before is not the reference, so its LoRA is one on the reference and is trained on.
    """
    if moved and tuning == "lora":
        return before.base
    return "" if before.lora and not before.merged else before.whole


def _stats(config: Config, store: RunDir, round_id: int) -> dict[str, Any]:
    """What the workers wrote into the folder, as one table; prints the lines that a user should read."""
    folder, section = store.path("policy", round_id), config.policy
    objective, reference = section.objective_of(round_id), config.reference_of(round_id)
    learner = LEARNERS[objective]
    steps = read_metrics(folder)
    state = read_state(folder)
    assert state is not None and state.result is not None
    rows, heldout = state.result["rows"], state.result["heldout"]
    losses = state.result["heldout_losses"]
    kept_at = _kept_at(losses)
    warnings = [line for step in steps for line in step.get(WARNINGS, [])]
    lines = learner.lines(rows, heldout)
    if kept_at < steps[-1]["step"]:
        lines.append(
            f"kept the policy of step {kept_at}; at step {steps[-1]['step']} the held-out loss was higher"
        )
    if too_long := rows["train_too_long"] + rows["valid_too_long"]:
        what = "pairs" if learner.unit == "pairs" else "texts"
        lines.append(
            f"{too_long} {what} are longer than {config.max_training_tokens} tokens and were left out"
        )
    for line in lines + warnings:
        say(f"  {objective}: {line}")
    return {
        "objective": objective,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "heldout": heldout,
        "accuracy": heldout.get("accuracy"),
        "margin": heldout.get("margin"),
        "heldout_loss": heldout.get("loss"),
        **{f"heldout_accuracy_{kind}": heldout.get(f"accuracy_{kind}") for kind in KINDS},
        "train_accuracy": steps[-1].get("accuracy"),
        "kl_per_token": steps[-1].get("kl_per_token"),
        # Steps since the texts were drawn, at the last one
        "staleness": len(steps) - 1,
        "engine_gap": steps[0].get("engine_gap"),
        f"{learner.unit}_per_s": steps[-1]["rows_per_s"],
        "peak_memory_mb": max(step["peak_memory_mb"] for step in steps),
        "steps": len(steps),
        "kept_step": kept_at,
        "reference": f"policy {reference}" if reference else "base LLM",
        "zero_stage": section.zero_stage,
        "warnings": warnings,
        "rows": rows,
        "max_length": config.max_training_tokens,
        "heldout_losses": losses,
        "continued_after": state.continued_after,
    }


def _kept_at(losses: dict[str, float | None]) -> int:
    """The step whose policy was kept: the last one of the lowest held-out loss; the last evaluation without such losses."""
    known = [(loss, -int(step)) for step, loss in losses.items() if loss is not None]
    return -min(known)[1] if known else max(map(int, losses))
