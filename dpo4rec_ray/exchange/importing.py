"""Preference sets from elsewhere as the pairs of round 1 of a new run."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.core.pairing import Kind
from dpo4rec_ray.datasets.files import absolute, file_identity
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.exchange.chat_codec import ChatCodec
from dpo4rec_ray.exchange.preference_files import read_row, read_rows
from dpo4rec_ray.exchange.preference_rows import NOT_AN_OBJECT, BadRow, Fields
from dpo4rec_ray.knowledge.text_table import TextCounts
from dpo4rec_ray.policy.model import load_tokenizer
from dpo4rec_ray.storage.places import new_file
from dpo4rec_ray.store.artifacts import RunDir, fingerprint_of
from dpo4rec_ray.store.dependencies import Dependencies
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.policies import base_llm_path
from dpo4rec_ray.store.progress import Progress, say
from dpo4rec_ray.store.schemas import SCHEMAS
from dpo4rec_ray.texts.policy_texts import PolicyTexts

SET_ASIDE = "pairs-rejected.jsonl"
PAIRS_PER_PART = 8192
Pair = dict[str, Any]  # a row of the artifact `pairs`


def import_pairs(config: Config, store: RunDir, files: list[Path], form: str, heldout: float) -> None:
    """Write `pairs` of round 1, unless they are there and were made from the same files and settings.

    Raises:
        UserError: a file cannot be read, or no row gives a pair to train on.
    """
    max_length = config.max_training_tokens
    llm = PolicyTexts.identity(config, store)
    identities = [file_identity(absolute(str(file))) for file in files]
    fingerprint = fingerprint_of(
        "import", form, str(heldout), str(max_length), str(config.run.seed), llm, *identities
    )
    kept = store.manifest("pairs", 1)
    if kept is not None and kept.fingerprint == fingerprint:
        say(f"import(1): kept, {kept.rows} rows, {store.path('pairs', 1)}")
        return
    began = time.monotonic()
    say("import(1): started")
    store.start("pairs", 1)
    codec = ChatCodec(load_tokenizer(base_llm_path(config, store)))
    counts, skipped = Counter[str](), TextCounts()

    def split_of(row: int) -> str:
        return "valid" if seed_of(config.run.seed, "heldout", row) < heldout * 2**31 else "train"

    with (
        new_file(store.root / SET_ASIDE) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as rejected,
        Progress("import", 0, "rows") as progress,
    ):

        def set_aside(reason: str, where: str, line: str) -> None:
            skipped.leave_out(reason, where)
            entry = {"where": where, "reason": reason, "line": line}
            rejected.write(json.dumps(entry, ensure_ascii=False) + "\n")

        def rows() -> Iterator[tuple[str, Fields | None, bytes]]:
            for row in itertools.chain.from_iterable(map(read_rows, files)):
                yield row
                counts["rows"] += 1
                progress.at(counts["rows"])

        pairs = _joined(_read_pairs(rows(), form, codec, max_length, split_of, set_aside))
        for part in itertools.count():
            own = list(itertools.islice(pairs, PAIRS_PER_PART))
            if not own:
                break
            for pair in own:
                counts[pair["split"]] += 1
                counts["tokenized"] += pair["tokenized"]
            store.write("pairs", pa.Table.from_pylist(own, schema=SCHEMAS["pairs"]), 1, part)
    if not counts["train"]:
        raise UserError(
            f"{', '.join(map(str, files))}: no pair to train on; set aside: {skipped.words or 'none'}"
        )
    stats = {
        "pairs": counts["train"],
        "heldout_pairs": counts["valid"],
        "tokenized": counts["tokenized"],
        "dropped": dict(skipped.left_out),
    }
    seconds = round(time.monotonic() - began, 2)
    outcome = Outcome(rows_in=counts["rows"], rows_out=counts["train"] + counts["valid"], stats=stats)
    store.finish(outcome.manifest("pairs", Dependencies(fingerprint), seconds, config.run.seed), 1)
    say(
        f"import(1): {counts['train']} training pairs, {counts['valid']} held out, {counts['tokenized']} tokenised, "
        f"the others by their stored token ids, {seconds:.1f} s, {store.path('pairs', 1)}"
    )
    if skipped.left_out:
        say(f"  set aside in {store.root / SET_ASIDE}: {skipped.words}")


def _read_pairs(
    rows: Iterator[tuple[str, Fields | None, bytes]],
    form: str,
    codec: ChatCodec,
    max_length: int,
    split_of: Callable[[int], str],
    set_aside: Callable[[str, str, str], None],
) -> Iterator[Pair]:
    """One pair for every row that gives one. split_of: split of a row that names none, by its number over all files."""
    for number, (where, row, line) in enumerate(rows):
        try:
            if row is None:
                raise BadRow(NOT_AN_OBJECT)
            found = read_row(row, form)
            ids = codec.encode(found)
            if len(ids.prompt) + max(map(len, (ids.chosen, *ids.rejected))) > max_length:
                raise BadRow(f"longer than {max_length} tokens")
        except BadRow as error:
            text = line.decode(errors="replace").strip() if line else json.dumps(row, default=str)
            set_aside(str(error), where, text)
            continue
        own = found.stored
        user = number if own is None or own.user_id is None else own.user_id
        other = own is not None and own.kind == Kind.OTHER
        yield {
            "round": 1,
            "user_id": user,
            "pair_id": 0 if own is None or own.pair_id is None else own.pair_id,
            "split": split_of(number) if own is None or own.split is None else own.split,
            "kind": (Kind.OTHER if other else Kind.OWN).value,
            "rejected_user_id": own.rejected_user_id if own is not None and other else user,
            # as Python integers the ids of a part would take gigabytes
            "prompt_token_ids": np.asarray(ids.prompt, np.int32),
            "chosen_token_ids": np.asarray(ids.chosen, np.int32),
            "rejected_token_ids": [np.asarray(one, np.int32) for one in ids.rejected],
            "chosen_reward": found.chosen_reward,
            "rejected_reward": found.rejected_reward,
            "tokenized": ids.tokenized,
        }


def _joined(pairs: Iterator[Pair]) -> Iterator[Pair]:
    """Joins consecutive lines of one exported pair (one line per rejected text) into one pair again."""
    last: Pair | None = None
    for pair in pairs:
        if last is not None and _is_next(last, pair):
            last["rejected_token_ids"] += pair["rejected_token_ids"]
            last["rejected_reward"] += pair["rejected_reward"]
            continue
        if last is not None:
            yield last
        last = pair
    if last is not None:
        yield last


def _is_next(pair: Pair, line: Pair) -> bool:
    """Whether a line is the next rejected text of the same exported pair. Other rows have a user each."""
    names = ("prompt_token_ids", "chosen_token_ids")
    return (
        (pair["user_id"], pair["pair_id"]) == (line["user_id"], line["pair_id"])
        and all(np.array_equal(pair[name], line[name]) for name in names)
        and not any(np.array_equal(one, line["rejected_token_ids"][0]) for one in pair["rejected_token_ids"])
    )
