"""final/: which round's policy a run ends with, the one that is published unless another is asked for.

A card that names the folder, and no copy of it: all rounds stay, weights are large, and `dpo4rec export-model` writes a folder
that stands alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from dpo4rec_ray.config.recipe import RunSection
from dpo4rec_ray.store.artifacts import RunDir, write_json

FOLDER, CARD = "final", "policy.json"


@dataclass(frozen=True)
class FinalPolicy:
    """
    Attributes:
        round: the round; 0 where none improved on the base LLM.
        policy: the number of its last turn's policy.
        folder: the policy's folder, below the run's; "" for the base LLM.
        reference: what it was trained against, as its manifest says; "" for the base LLM.
        why: one sentence.
    """

    round: int
    policy: int
    folder: str
    reference: str
    why: str


def promote(run: RunSection, store: RunDir, best: int, last: int) -> FinalPolicy:
    """Write the card of the best policy.

    best, last: numbers of the best policy and of the last that was trained.
    """
    rounds, best_round = run.round_of(last), run.round_of(best)
    trained = f"{rounds} round{'s' if rounds > 1 else ''}"
    if best:
        why = f"the best of {trained} by the held-out reward and reading of the validation users"
    else:
        why = f"as none of {trained} improved on it by the validation users' reward and reading"
    folder = store.path("policy", best).relative_to(store.root).as_posix() if best else ""
    reference = str(store.require("policy", best).stats.get("reference", "")) if best else ""
    found = FinalPolicy(best_round, best, folder, reference, why)
    (store.root / FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(store.root / FOLDER / CARD, asdict(found))
    return found


def withdraw(store: RunDir) -> None:
    """Remove the card of an earlier recipe that trained an LLM in this folder."""
    (store.root / FOLDER / CARD).unlink(missing_ok=True)


def final_policy(store: RunDir) -> FinalPolicy | None:
    """The promoted policy; None where no round was validated."""
    try:
        return FinalPolicy(**json.loads((store.root / FOLDER / CARD).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
