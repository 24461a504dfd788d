"""Preference sets of other trainers: reading and writing the rows of their formats.

Layouts, by the key of `FORMATS`:
    trl: TRL's preference datasets, conversational or plain; on reading also with the prompt inside chosen and rejected.
    nemo: NeMo-RL's PreferenceDataset (`context`, `completions` by rank); on reading also its binary layout
        (`prompt`, `chosen`, `rejected`) and the `chosen_response`, `rejected_response` of NeMo-Aligner.
    sharegpt: LLaMA-Factory's sharegpt layout with `ranking: true`.

A written row also has the columns `OWN` with the stored token ids: a model samples spellings of a text that its tokenizer
would not choose, so the text alone does not give back what was sampled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo4rec_ray.core.pairing import Kind
from dpo4rec_ray.errors import UserError, first_line
from dpo4rec_ray.exchange import FORMATS
from dpo4rec_ray.exchange.chat_codec import ChatCodec
from dpo4rec_ray.exchange.preference_rows import (
    EMPTY,
    EQUAL,
    IDS,
    NO_PROMPT,
    NOT_TEXT,
    OWN,
    RANKS,
    ROLE,
    SEVERAL,
    UNKNOWN_LAYOUT,
    BadRow,
    Fields,
    Message,
    Preference,
    Stored,
)
from dpo4rec_ray.knowledge.prompts import TEMPLATE_SWITCHES

_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
_ROWS_AT_ONCE = 256  # of a Parquet file


# Reading


def read_rows(file: Path) -> Iterator[tuple[str, Fields | None, bytes]]:
    """(place, row, line) of every row of a Parquet file or of JSON lines, a few rows in memory at a time.

    The place is "file:number", counted from 1. row: None where the line is not a JSON object. line: as it is in the file; empty
    for Parquet.

    Raises:
        UserError: the file cannot be read, is damaged, or is one JSON array.
    """
    try:
        with open(file, "rb") as handle:
            start = handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(b"["):
            raise UserError(
                f"{file}: one JSON array; write one object per line, for instance with jq -c '.[]' {file.name}"
            )
        rows = _parquet_rows(file) if start.startswith(b"PAR1") else _json_rows(file)
        for number, row, line in rows:
            yield f"{file}:{number}", row, line
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read, or is damaged ({first_line(error)})") from None


def _json_rows(file: Path) -> Iterator[tuple[int, Fields | None, bytes]]:
    with open(file, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # RecursionError: very deeply nested brackets
                row = None
            yield number, row if isinstance(row, dict) else None, line


def _parquet_rows(file: Path) -> Iterator[tuple[int, Fields | None, bytes]]:
    number = 0
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE):
            for row in _dicts(batch):
                number += 1
                yield number, row, b""


def _dicts(batch: pa.RecordBatch) -> list[Fields | None]:
    """Rows as Python values; None for a row that Python cannot hold: a string that is not UTF-8, a date out of its range."""
    with suppress(ValueError, OverflowError):
        return batch.to_pylist()
    if len(batch) == 1:
        return [None]
    return [row for place in range(len(batch)) for row in _dicts(batch.slice(place, 1))]


def read_row(row: Fields, form: str) -> Preference:
    """A row of one layout of `FORMATS`, or of any of them ("auto"). Its texts are not checked here: `ChatCodec.encode` does it.

    Raises:
        BadRow: it is not of that layout, or has no user turn to answer.
    """
    found = _READERS[_layout(row) if form == "auto" else form](row)
    if not found.prompt or found.prompt[-1]["role"] != "user":
        raise BadRow(NO_PROMPT)
    return found


def _layout(row: Fields) -> str:
    if "completions" in row or "chosen_response" in row:
        return "nemo"
    if "conversations" in row:
        return "sharegpt"
    if "chosen" in row or "rejected" in row:
        return "trl"
    raise BadRow(UNKNOWN_LAYOUT)


def _from_trl(row: Fields) -> Preference:
    """As TRL's `maybe_extract_prompt`: a prompt inside the answers is their common beginning."""
    chosen, rejected, prompt = _get(row, "chosen"), _get(row, "rejected"), row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None:
            return _preference(row, _turns(prompt), chosen, rejected)
        shared = _num_shared(chosen, rejected)
        if chosen[:shared].endswith(" "):  # belongs to the answers' first words
            shared -= 1
        return _preference(row, _turns(chosen[:shared]), chosen[shared:], rejected[shared:])
    ours, theirs = (_turns(one, "assistant") for one in (chosen, rejected))
    if isinstance(prompt, list | dict):
        asked = _turns(prompt)
        shared = len(asked) if ours[: len(asked)] == asked == theirs[: len(asked)] else 0
    else:
        shared = _num_shared(ours, theirs)
        asked = ours[:shared] or _turns(_get(row, "prompt"))
    return _preference(row, asked, _answer(ours[shared:]), _answer(theirs[shared:]))


def _from_nemo(row: Fields) -> Preference:
    if "completions" not in row:
        responses = {
            name: row[f"{name}_response"] for name in ("chosen", "rejected") if f"{name}_response" in row
        }
        return _from_trl({**row, **responses})
    completions = row["completions"]
    if not isinstance(completions, list) or not all(isinstance(one, dict) for one in completions):
        raise BadRow(NOT_TEXT)
    if len(completions) < 2 or any(math.isnan(_number(one.get("rank"))) for one in completions):
        raise BadRow(RANKS)
    best, *others = sorted(completions, key=lambda one: one["rank"])
    if others[0]["rank"] == best["rank"]:
        raise BadRow(RANKS)
    answers = [_answer(_get(one, "completion")) for one in (best, *others)]
    return _preference(row, _turns(_get(row, "context")), *answers)


def _from_sharegpt(row: Fields) -> Preference:
    turns = _turns(_get(row, "conversations"))
    system = row.get("system")
    if isinstance(system, str) and system.strip() and turns and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return _preference(row, turns, *(_answer(_get(row, name)) for name in ("chosen", "rejected")))


def _preference(row: Fields, prompt: list[Message], chosen: str, *rejected: str) -> Preference:
    """With the rewards and the token ids from the row's own columns."""
    reward = _number(row.get("rejected_reward"))
    return Preference(
        prompt,
        chosen,
        list(rejected),
        _number(row.get("chosen_reward")),
        [reward] * len(rejected),
        _stored(row) if len(rejected) == 1 else None,
    )


def _stored(row: Fields) -> Stored | None:
    ids = [row.get(name) for name in IDS]
    if not all(isinstance(one, list) and one and all(type(i) is int and i >= 0 for i in one) for one in ids):
        return None
    split, kind = row.get("split"), row.get("kind")
    return Stored(
        ids[0],
        ids[1],
        ids[2],
        _whole(row.get("user_id"), 63),
        split if split in ("train", "valid") else None,
        _whole(row.get("pair_id"), 31),
        kind if kind in list(Kind) else None,
        _whole(row.get("rejected_user_id"), 63),
    )


def _whole(value: Any, bits: int) -> int | None:
    """A whole number that fits so many bits beside its sign; None for anything else."""
    return value if type(value) is int and -(2**bits) <= value < 2**bits else None


def _get(row: Fields, name: str) -> Any:
    if row.get(name) is None:
        raise BadRow(f"no field {name!r}")
    return row[name]


def _number(value: Any) -> float:
    """NaN for what is not a number, infinities and integers beyond a float's range included."""
    with suppress(OverflowError):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return math.nan


def _turns(value: Any, role_of_text: str = "user") -> list[Message]:
    """Messages of either spelling (role and content, from and value), one message, or one text."""
    if isinstance(value, str):
        return [{"role": role_of_text, "content": value}]
    turns: list[Message] = []
    for message in value if isinstance(value, list) else [value]:
        if not isinstance(message, dict):
            raise BadRow(NOT_TEXT)
        content = message["content"] if message.get("content") is not None else message.get("value")
        role = message["role"] if message.get("role") is not None else message.get("from")
        if not isinstance(content, str):
            raise BadRow(NOT_TEXT)
        if not isinstance(role, str) or role not in _ROLES:
            raise BadRow(ROLE)
        turns.append({"role": _ROLES[role], "content": content})
    return turns


def _answer(value: Any) -> str:
    """The text of one answer: a text, or one turn of the assistant."""
    turns = _turns(value, "assistant")
    if len(turns) != 1:
        raise BadRow(SEVERAL if turns else EMPTY)
    if turns[0]["role"] != "assistant":
        raise BadRow(ROLE)
    return turns[0]["content"]


def _num_shared(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """How many first turns, or characters, two answers have in common.

    Raises:
        BadRow: they are the same.
    """
    if ours == theirs:
        raise BadRow(EQUAL)
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(ours, theirs, strict=False)))


_READERS: dict[str, Callable[[Fields], Preference]] = dict(
    zip(FORMATS, (_from_trl, _from_nemo, _from_sharegpt), strict=True)
)


# Writing


def write_rows(pair: Fields, codec: ChatCodec, form: str) -> Iterator[tuple[dict[str, Any], bool]]:
    """The rows of a pair, one per rejected text, each with whether its texts alone give back its token ids.

    pair: a row of the artifact `pairs`.

    Raises:
        BadRow: the prompt is not one user turn of the LLM's chat template.
    """
    prompt, chosen = codec.user_text(pair["prompt_token_ids"]), codec.answer_text(pair["chosen_token_ids"])
    alike = codec.encode_prompt([{"role": "user", "content": prompt}]) == pair["prompt_token_ids"]
    for ids, reward in zip(pair["rejected_token_ids"], pair["rejected_reward"], strict=True):
        rejected = codec.answer_text(ids)
        same = alike and codec.encode_answers([chosen, rejected]) == [pair["chosen_token_ids"], ids]
        own = {
            **{name: pair[name] for name in OWN},
            "rejected_token_ids": ids,
            "chosen_reward": _finite(pair["chosen_reward"]),
            "rejected_reward": _finite(reward),
        }
        yield {**_text_fields(prompt, chosen, rejected, codec, form), **own}, same


def _text_fields(prompt: str, chosen: str, rejected: str, codec: ChatCodec, form: str) -> dict[str, Any]:
    """The fields that the trainer of a layout reads."""
    if form == "sharegpt":
        return {
            "conversations": [{"from": "human", "value": prompt}],
            "chosen": {"from": "gpt", "value": chosen},
            "rejected": {"from": "gpt", "value": rejected},
        }
    asked = [{"role": "user", "content": prompt}]
    best, other = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    if form == "nemo":
        return {
            "context": asked,
            "completions": [{"rank": 0, "completion": best}, {"rank": 1, "completion": other}],
        }
    if not codec.has_template:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    # TRL passes the switches to the template
    return {"prompt": asked, "chosen": best, "rejected": other, "chat_template_kwargs": TEMPLATE_SWITCHES}


def _finite(reward: float | None) -> float | None:
    return reward if reward is not None and math.isfinite(reward) else None
