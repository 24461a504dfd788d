"""What each stage of a run took: time, tokens per second, GPU hours, and the price of an endpoint's tokens."""

from __future__ import annotations

from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.evaluation.systems import Row
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.metrics_file import read_metrics
from dpo4rec_ray.train.learners import LEARNERS
from dpo4rec_ray.workers.stage_workers import stage_workers

WRITTEN = {
    "encode": "knowledge",
    "generate": "generations",
}  # stages that write texts -> what their stats are in


def spent(config: Config, store: RunDir, stages: list[dict[str, Any]]) -> list[Row]:
    """The stages with what is known of each beside their seconds.

    A row has "tokens" and "tokens_per_s" where the stage writes or learns texts, "gpus" that it holds, "gpu_hours" of these
    from its start to its end, and "cost" of an endpoint in the currency of openai.input_price; None where unknown.
    """
    workers = stage_workers(config)
    found: list[Row] = []
    for stage in stages:
        gpus = sum(one.count * one.needs.num_gpus for one in workers.get(stage["stage"], []))
        found.append(
            {
                **stage,
                **_tokens(store, stage["stage"], stage["round"]),
                "gpus": gpus,
                "gpu_hours": gpus * stage["seconds"] / 3600,
            }
        )
    return found


def _tokens(store: RunDir, stage: str, round_id: int) -> Row:
    none: Row = {"tokens": None, "tokens_per_s": None, "cost": None}
    if stage in LEARNERS:
        rates = [
            line["tokens_per_s"]
            for line in read_metrics(store.path("policy", round_id))
            if "tokens_per_s" in line
        ]
        return none | ({"tokens_per_s": sum(rates) / len(rates)} if rates else {})
    manifest = store.manifest(WRITTEN[stage], round_id) if stage in WRITTEN else None
    if manifest is None:
        return none
    stats = manifest.stats
    rate = stats.get("this_run", {}).get("tokens_per_s")
    return {"tokens": stats.get("tokens") or None, "tokens_per_s": rate or None, "cost": stats.get("cost")}
