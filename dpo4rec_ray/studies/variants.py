"""The run folder of a variant: what the recipe's own run has is lent to it, and the stages decide what of it they can keep."""

from __future__ import annotations

from dpo4rec_ray.config import Config
from dpo4rec_ray.pipeline import STAGES, made, steps
from dpo4rec_ray.policy.model import FULL, MERGED
from dpo4rec_ray.storage.places import link_folder, place
from dpo4rec_ray.store.artifacts import LATER_PATHS, PATHS, RunDir
from dpo4rec_ray.store.policies import merges_lora

# As llm.path in a variant's keys: the policy that the recipe's run trains, in the same seed.
OWN_POLICY = "RECIPE"


def trained_policy(config: Config) -> str:
    """The folder where the run of a recipe will have its last policy as a whole model; "" where it has none, or where it
    may end before its last round.
    """
    rounds = config.run.num_rounds
    whole = {"full": FULL, "lora": MERGED if merges_lora(config) else ""}[config.policy.tuning]
    if not config.has_policy or not rounds or rounds == "auto" or not whole:
        return ""
    if config.run.patience < rounds > 1:
        return ""
    store = RunDir(place(config.run.root) / config.run.name)
    return str(store.path("policy", rounds * config.run.turns_per_round) / whole)


def lend(base: RunDir, variant: RunDir) -> None:
    """Put every complete artifact of `base` into a run folder that has not begun.

    A run that has begun has its config.json and is left as it is: what an interrupted stage of it wrote is not to be lost. Which
    of the artifacts are kept is decided when the variant runs, by their fingerprints.
    """
    if (variant.root / "config.json").exists():
        return
    turns = sorted(int(folder.name) for folder in base.root.glob("rounds/[0-9]*"))
    for name, path in PATHS.items():
        for turn in (0, *turns) if "{round" in path + LATER_PATHS.get(name, "") else (0,):
            if base.manifest(name, turn) and not variant.manifest(name, turn):
                link_folder(base.path(name, turn), variant.path(name, turn))


def kept_and_redone(config: Config, base: RunDir, variant: RunDir) -> dict[str, str]:
    """Each step of a finished variant, "dpo(1)" -> "kept" from the recipe's run, "redone", or "" where the run came to its end
    without it. config: the variant's.
    """
    found: dict[str, str] = {}
    for name, turn in steps(config):
        own, lent = made(variant, name, turn), made(base, name, turn)
        same = own and lent and own.produced == lent.produced
        found[f"{name}({turn})"] = ("kept" if same else "redone") if own else ""
    return found


def seconds(config: Config, store: RunDir) -> float:
    """Seconds of all steps of a finished run, wherever they were made."""
    return sum(manifest.seconds for name, turn in steps(config) if (manifest := made(store, name, turn)))


def last_turn(store: RunDir) -> int:
    """The last turn whose texts a finished run evaluated."""
    return int(store.require("per_list").stats["last_round"])


def stage_names() -> list[str]:
    """All stages, in the order in which they run."""
    return list(STAGES)
