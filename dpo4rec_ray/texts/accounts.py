"""What the parts of `generations` and `knowledge` add up to: rows, counts, reasons and costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from dpo4rec_ray.config import Config
from dpo4rec_ray.storage.parquet import read_parquet
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.artifacts import part_notes
from dpo4rec_ray.workers.shards import part_number

SUBJECTS = ("user", "item", "statistics", "oracle")  # of the texts in `knowledge`


def generation_counts(folder: Place, wanted: np.ndarray, num_samples: int) -> Counter[str]:
    """Counts of all parts of `generations`, from their footers, with "rows".

    wanted: users of each shard, [S]. Every user has exactly N rows or a reason; anything else is a mistake of ours.
    """
    counts: Counter[str] = Counter()
    seen = np.zeros_like(wanted)
    for file in sorted(folder.glob("part-*.parquet")):
        rows, notes = part_notes(file)
        assert rows == num_samples * (notes["users"] - notes["failed"]), f"{file}: {rows} rows, {notes}"
        seen[part_number(file)] = notes["users"]
        counts.update({"rows": rows, **notes})
    missing = np.flatnonzero(seen != wanted)
    assert not len(missing), f"shards without all their users: {missing[:5]}"
    return counts


def knowledge_counts(folder: Place) -> tuple[int, dict[str, Counter[str]]]:
    """Rows of all parts of `knowledge`, and counts for each subject, from the parts' footers."""
    rows, counts = 0, {subject: Counter[str]() for subject in SUBJECTS}
    for file in folder.glob("part-*.parquet"):
        own, notes = part_notes(file)
        rows += own
        counts[notes.pop("subject")].update(notes)
    return rows, counts


def failure_reasons(folder: Place) -> Counter[str]:
    """How many failed for each reason, from an artifact's folder `failed`."""
    reasons: Counter[str] = Counter()
    for file in sorted((folder / "failed").glob("*.parquet")):
        reasons.update(read_parquet(file, columns=["reason"])["reason"].to_pylist())
    return reasons


def cost_of(config: Config, counts: Mapping[str, int]) -> dict[str, float]:
    """{"cost": ...} of an endpoint's tokens, in the currency of the prices; empty if there is no price."""
    section = config.openai
    if config.llm.source != "openai" or not (section.input_price or section.output_price):
        return {}
    cost = section.input_price * counts["prompt_tokens"] + section.output_price * counts["tokens"]
    return {"cost": round(cost / 1e6, 6)}
