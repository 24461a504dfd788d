"""DPO of round r: policy r-1 plus LoRA on the round's pairs, under Ray Train and DeepSpeed ZeRO.

The result is a peft adapter folder, and for an engine that is faster with whole weights (vLLM on CPU) also the merged
model. A round that builds on a policy that was not merged merges it first.
"""

from __future__ import annotations

import json

from dpo4rec_ray.artifacts import RunDir
from dpo4rec_ray.config import Config
from dpo4rec_ray.policy.model import PolicyWeights, save_merged, write_policy
from dpo4rec_ray.stages.common import WORKER_ENV, Outcome, merges_lora, policy_weights, say, seed_of
from dpo4rec_ray.stages.train_policy import HELDOUT, dpo_loop, train_settings
from dpo4rec_ray.stages.training import launch, read_metrics


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `policy` of the round."""
    import ray

    section = config.dpo
    folder = store.start("policy", round_id)
    # in a worker: the driver may be a small machine
    merge = ray.remote(num_cpus=1, max_calls=1, runtime_env={"env_vars": WORKER_ENV})(save_merged)
    before = policy_weights(config, store, round_id - 1)
    from_base = section.reference == "base" and round_id > 1
    if from_base:
        base = before.base
    elif before.adapter and not before.merged:
        ray.get(merge.remote(before.base, before.adapter, folder / "start", config.llm.dtype))
        base = str(folder / "start")
    else:
        base = before.whole
    launch(
        dpo_loop,
        {
            "settings": train_settings(section, config.llm.dtype, seed_of(config.run.seed, "dpo", round_id)),
            "store": store,
            "folder": str(folder),
            "base": base,
            "continue_from": before.adapter if from_base else None,
            "lora_rank": section.lora_rank,
            "lora_alpha": section.lora_alpha,
            "beta": section.beta,
            "round_id": round_id,
        },
        folder=folder,
        num_workers=section.num_workers,
        gpus_per_worker=section.gpus_per_worker,
        label="dpo",
        unit="steps",
    )
    weights = PolicyWeights(base=base, adapter=str(folder / "adapter"))
    if merges_lora(config):
        ray.get(merge.remote(base, weights.adapter, folder / "merged", config.llm.dtype))
        weights = PolicyWeights(base=base, adapter=weights.adapter, merged=str(folder / "merged"))
    steps = read_metrics(folder)
    heldout = json.loads((folder / HELDOUT).read_text(encoding="utf-8"))
    pairs = store.require("pairs", round_id).figures
    figures = {
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "accuracy": heldout.get("accuracy"),
        "margin": heldout.get("margin"),
        "train_accuracy": steps[-1]["accuracy"],
        "kl_per_token": steps[-1]["kl_per_token"],
        "steps": len(steps),
        "reference": "base LLM" if section.reference == "base" else f"policy {round_id - 1}",
        "zero_stage": section.zero_stage,
    }
    write_policy(folder, weights, {"round": round_id, "beta": section.beta, "figures": figures})
    if heldout:
        say(f"  dpo: accuracy on {pairs['heldout_pairs']} held-out pairs {heldout['accuracy']:.3f}")
    return Outcome(rows_in=pairs["pairs"], rows_out=len(steps), figures=figures)
