"""Which workers each stage has at the same time, and what they need: the whole recipe's room, before anything starts."""

from __future__ import annotations

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.placed import Placed
from dpo4rec_ray.config.training import BootstrapSection, PolicySection, TrainerSection
from dpo4rec_ray.workers.needs import Needs
from dpo4rec_ray.workers.placement import pool_workers
from dpo4rec_ray.workers.room import ALL, Workers


def _keys(section: str, *names: str) -> str:
    return f"{section}.{', '.join(names)}"


ENGINE_KEYS = _keys("generate", "num_engines", "cpus_per_engine", "gpus_per_engine")
ENCODER_KEYS = _keys("encoder", "num_workers", "cpus_per_worker", "gpus_per_worker")
SCORER_KEYS = _keys("reward", "num_scorers", "cpus_per_scorer", "gpus_per_worker")
REWARD_KEYS = _keys("reward", "num_workers", "gpus_per_worker")
EVALUATE_KEYS = _keys("evaluate", "gpus_per_task")
PREPARE_KEYS = _keys("data", "label_selector", "resources", "memory_gib")


def engine_needs(config: Config) -> Needs:
    """Of one engine, or of one actor of a source that has none."""
    section = config.generate
    gpus = section.gpus_per_engine if config.has_policy else 0.0
    return Needs.of(section, section.cpus_per_engine, gpus, over_nodes=section.over_nodes and gpus > 0)


def engines(config: Config) -> Workers:
    """What writes texts."""
    section = config.generate
    if section.keep_engines and config.has_policy:
        return Workers("engines", section.num_engines, engine_needs(config), ENGINE_KEYS)
    return pool_workers(
        "engines", section.num_engines, engine_needs(config), ENGINE_KEYS, section.min_engines
    )


def encoders(config: Config) -> Workers:
    """What makes vectors of texts."""
    section = config.encoder
    needs = Needs.of(section, section.cpus_per_worker, section.gpus_per_worker)
    return pool_workers("encoders", section.num_workers, needs, ENCODER_KEYS)


def scorers(config: Config) -> Workers:
    """What scores vectors with the reward rerankers."""
    section = config.reward
    needs = Needs.of(section, section.cpus_per_scorer, section.gpus_per_worker)
    return pool_workers("scorers", section.num_scorers, needs, SCORER_KEYS)


def reward_tasks(config: Config) -> Workers:
    """What trains the reward rerankers, or measures texts with them."""
    needs = Needs.of(config.reward, 1, config.reward.gpus_per_worker)
    return Workers("tasks of the reward", 1, needs, REWARD_KEYS)


def prepare_tasks(config: Config) -> Workers:
    """What reads the raw files and makes the lists."""
    return Workers("tasks of prepare", 1, Needs.of(config.data, 1), PREPARE_KEYS)


def evaluation_tasks(config: Config) -> Workers:
    """What fits a reranker for the evaluation, or a trial of the search."""
    needs = Needs.of(config.evaluate, 1, config.evaluate.gpus_per_task)
    return Workers("fits", 1, needs, EVALUATE_KEYS)


def trainers(section: TrainerSection, label: str, least: int = 0) -> Workers:
    """The workers of a training, which start together. label: its stage. least: go on with so many; 0: with all."""
    needs = Needs.of(section, section.cpus_per_worker, section.gpus_per_worker)
    name = "policy" if isinstance(section, PolicySection) else label.removeprefix("train_")
    keys = _keys(name, "num_workers", "cpus_per_worker", "gpus_per_worker")
    return Workers(f"workers of {label}", section.num_workers, needs, keys, least or ALL)


def reward_trainer(config: Config) -> TrainerSection:
    """The training of the reward rerankers where several workers share it."""
    return TrainerSection(
        num_workers=config.reward.num_workers,
        gpus_per_worker=config.reward.gpus_per_worker,
        max_failures=0,  # no checkpoints: a retry would start from the beginning
        **{name: getattr(config.reward, name) for name in Placed.model_fields},
    )


def stage_workers(config: Config) -> dict[str, list[Workers]]:
    """The stages of the recipe that have workers of their own: those which run at the same time. Others need one CPU."""
    found: dict[str, list[Workers]] = {"prepare": [prepare_tasks(config)]}
    policy: PolicySection = config.policy
    bootstrap: BootstrapSection = config.bootstrap
    if config.has_policy and config.llm.path == "bootstrap":
        found["bootstrap"] = [trainers(bootstrap, "bootstrap")]
    found["encode"] = [engines(config), encoders(config)]
    if config.run.max_rounds:
        several = config.reward.num_workers > 1
        found["train_reward"] = [
            trainers(reward_trainer(config), "train_reward") if several else reward_tasks(config)
        ]
        found["generate"] = [engines(config)]
        found["score"] = [encoders(config), scorers(config)]
        if config.has_policy:
            for objective in policy.objectives:
                found[objective] = [trainers(policy, objective, policy.min_workers)]
    found["evaluate"] = [evaluation_tasks(config)]
    return found
