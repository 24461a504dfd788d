"""The pairs of a run as the rows of another trainer's format."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.exchange.chat_codec import ChatCodec
from dpo4rec_ray.exchange.preference_files import write_rows
from dpo4rec_ray.exchange.preference_rows import NOT_ONE_TURN, BadRow
from dpo4rec_ray.storage.parquet import parquet_file, parquet_metadata
from dpo4rec_ray.storage.places import new_file
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.store.schemas import SCHEMA_VERSION, SCHEMAS


def export_pairs(store: RunDir, round_id: int, split: str, codec: ChatCodec, form: str, target: Path) -> None:
    """Write one split of a round's pairs as JSON lines; the file appears when it is complete.

    Raises:
        UserError: the pairs hold no token ids, or none of them can be written.
    """
    counts = Counter[str]()
    with new_file(target) as temporary:
        with open(temporary, "w", encoding="utf-8") as lines:
            for row in _exported(store, round_id, split, codec, form, counts):
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not counts["lines"]:
            raise UserError(
                f"{store.path('pairs', round_id)}: no {split} pair can be written; {counts['left out']} {NOT_ONE_TURN}"
            )
    say(
        f"export: {counts['lines']} lines of {counts['pairs']} pairs, left out {counts['left out'] or 'none'}, {target}"
    )
    if counts["left out"]:
        say(f"  left out: {NOT_ONE_TURN}")
    say(
        f"  {counts['otherwise']} lines hold a text that would be tokenised otherwise than it was sampled, or was cut at "
        "generate.max_new_tokens; their token ids are as sampled"
    )


def round_with_pairs(store: RunDir, wanted: int | None) -> int:
    """The round to export: the one that is asked for, or the only one."""
    made = sorted(
        int(file.parent.parent.name) for file in store.root.glob("rounds/[0-9]*/pairs/manifest.json")
    )
    # Pairs of an earlier training may lie where another learner was trained since.
    policies = {number: store.manifest("policy", number) for number in made}
    rounds = [
        number for number, one in policies.items() if not one or one.stats.get("objective", "dpo") == "dpo"
    ]
    if wanted is None and len(rounds) > 1:
        raise UserError(
            f"{store.root} has pairs of the rounds {', '.join(map(str, rounds))}; choose one with --round"
        )
    round_id = wanted if wanted is not None else (rounds or [1])[0]
    old = store.require("pairs", round_id).schema_version != SCHEMA_VERSION
    # columns were added within a version
    if old or any(
        parquet_metadata(file).schema.to_arrow_schema().names != SCHEMAS["pairs"].names
        for file in store.files("pairs", round_id)
    ):
        raise UserError(f"{store.path('pairs', round_id)}: written by another version; run the recipe again")
    return round_id


def _exported(
    store: RunDir, round_id: int, split: str, codec: ChatCodec, form: str, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The lines of every pair. counts: of lines, pairs, pairs left out, and lines whose texts do not give back their ids."""
    # With run.keep_pairs those of earlier rounds stand beside the round's own, which alone are written.
    several = store.require("pairs", round_id).stats.get("earlier_pairs", 0) > 0
    for file in store.files("pairs", round_id):
        with parquet_file(file) as parquet:
            batches = parquet.iter_batches(batch_size=256)
            for pair in itertools.chain.from_iterable(batch.to_pylist() for batch in batches):
                if pair["split"] != split or (several and pair["round"] != round_id):
                    continue
                if not pair["prompt_token_ids"]:
                    raise UserError(
                        f'{file}: these pairs hold no token ids; only texts of llm.source = "vllm" have them'
                    )
                try:
                    rows = list(write_rows(pair, codec, form))
                except BadRow:
                    counts["left out"] += 1
                    continue
                counts["pairs"] += 1
                for row, same in rows:
                    counts["lines"] += 1
                    counts["otherwise"] += not same
                    yield row
