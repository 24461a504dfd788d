"""DPO: the pairs of a round, of own texts and against other users' texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.pairing import Kind
from dpo4rec_ray.core.preference import SMOOTHED
from dpo4rec_ray.core.watch import Watch
from dpo4rec_ray.policy.groups import Group
from dpo4rec_ray.policy.objectives import BatchLayout, DPOObjective, pair_group
from dpo4rec_ray.policy.rows import ArrowRows, pair_lengths, with_reference
from dpo4rec_ray.policy.trainer import FirstFigure
from dpo4rec_ray.storage.parquet import read_parquet
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.artifacts import Manifest
from dpo4rec_ray.train.policy_task import Material, PolicyTask, TextSource
from dpo4rec_ray.train.reference_logps import read_reference

KINDS = tuple(kind.value for kind in Kind)
# How far a text's log-ratio may be from 0 before training, in nats. It is rounding: sums over hundreds of tokens, in batches
# of another shape. Times beta it is how far the first loss may be from ln 2.
FIRST_LOSS_NOISE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.2}


class PairTexts(TextSource):
    """The texts of the artifact `pairs`."""

    artifacts, schema, per_token, unit = ("pairs",), "reference_logps", False, "pairs"

    def total(self, manifests: Sequence[Manifest]) -> int:
        return manifests[0].rows

    def read(self, files: Sequence[Place]) -> tuple[pa.Array, list[Group]]:
        [file] = files
        pairs = read_parquet(file)
        return pairs["user_id"], [pair_group(row) for row in ArrowRows(pairs)]

    def table(self, users: pa.Array, logps: list[list[float]]) -> pa.Table:
        return pa.table(
            {
                "user_id": users,
                "chosen_logp": pa.array([one[0] for one in logps], pa.float64()),
                "rejected_logp": pa.array([one[1:] for one in logps], pa.list_(pa.float64())),
            }
        )


class DPOLearner:
    """The preference losses of core.preference, against a reference."""

    texts: TextSource | None = PairTexts()
    unit = "pairs"
    shown = ("loss", "accuracy", "margin")

    def material(self, task: PolicyTask) -> Material:
        columns = ["user_id", "split", "kind", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids"]
        pairs = task.store.read("pairs", task.round_id, columns=columns)
        if task.reference:
            pairs = with_reference(pairs, read_reference(task.reference))
        max_length = task.config.max_training_tokens
        total, longest = pair_lengths(pairs)
        splits, kinds = np.asarray(pairs["split"]), np.asarray(pairs["kind"])
        tables: dict[str, pa.Table] = {}
        counts: dict[str, int] = {}
        for split in ("train", "valid"):
            chosen = (splits == split) & (longest <= max_length)
            tables[split] = pairs.filter(pa.array(chosen))
            counts[split] = int(chosen.sum())
            counts |= {f"{split}_{kind}": int((chosen & (kinds == kind)).sum()) for kind in KINDS}
            counts[f"{split}_too_long"] = int(((splits == split) & (longest > max_length)).sum())
        heldout = {kind: tables["valid"].filter(pc.equal(tables["valid"]["kind"], kind)) for kind in KINDS}
        counts |= {
            f"valid_{kind}_users": pc.count_distinct(own["user_id"]).as_py() for kind, own in heldout.items()
        }
        return Material(
            ArrowRows(tables["train"]),
            total[(splits == "train") & (longest <= max_length)],
            {kind: ArrowRows(own) for kind, own in heldout.items()},
            {kind: counts[f"train_{kind}"] for kind in KINDS},
            counts,
        )

    def objective(self, layout: BatchLayout, task: PolicyTask) -> DPOObjective:
        return DPOObjective(layout, task.config.dpo)

    def stored(self, config: Config, moved: bool) -> tuple[bool, bool]:
        return config.policy.reference == "cached", False

    def temperature(self, config: Config, round_id: int) -> float:
        return 1.0

    def watch(self, config: Config, num_steps: int) -> Watch:
        return Watch(num_steps, config.policy.max_kl_per_token)

    def first_figure(self, task: PolicyTask) -> FirstFigure | None:
        """Each pair's loss is ln 2 where policy equals reference."""
        section = task.config.dpo
        if section.loss not in SMOOTHED or task.moved or section.nll_weight:
            return None
        noise = FIRST_LOSS_NOISE[task.config.llm.dtype] * max(section.beta, 0.1)
        return FirstFigure("loss", math.log(2), noise)

    def lines(self, counts: dict[str, int], heldout: dict[str, float]) -> list[str]:
        found = []
        for kind in KINDS:
            if (accuracy := heldout.get(f"accuracy_{kind}")) is not None:
                what = "own texts" if kind == Kind.OWN else "another user's text"
                found.append(
                    f"accuracy on {counts[f'valid_{kind}']} held-out pairs with {what} rejected {accuracy:.3f}"
                )
        return found
