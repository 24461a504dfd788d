"""Preference sets of other trainers: their rows, and how texts become the token ids that DPO trains on, and back.

Layouts, by the key of `FORMATS`:
    trl: TRL's preference datasets, conversational or plain; on reading also with the prompt inside chosen and rejected.
    nemo: NeMo-RL's PreferenceDataset (`context`, `completions` by rank); on reading also its binary layout
        (`prompt`, `chosen`, `rejected`) and the `chosen_response`, `rejected_response` of NeMo-Aligner.
    sharegpt: LLaMA-Factory's sharegpt layout with `ranking: true`.

A written row also has the columns `OWN` with the stored token ids: a model samples spellings of a text that its tokenizer
would not choose, so that text alone does not give back what was sampled. Nothing of a file is trusted: texts are
data, and what looks like a control token in one is broken up before it is tokenised.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError

from dpo4rec_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]  # role ("system", "user", "assistant") and content
Fields = Mapping[str, Any]
TokenIds = Sequence[int]

OWN = (
    "user_id",
    "split",
    "prompt_token_ids",
    "chosen_token_ids",
    "rejected_token_ids",
    "chosen_reward",
    "rejected_reward",
)
EMPTY, NOT_TEXT, NOT_UNICODE = "a text is empty", "a field holds no text", "a text holds half a character"
NOT_AN_OBJECT, UNKNOWN_LAYOUT = "not a JSON object", "a layout that is not known"
NO_PROMPT, EQUAL = "no user turn to answer", "chosen and rejected are the same"
ROLE, SEVERAL, RANKS = "an unknown role", "an answer of several turns", "ranks that name no best answer"
REFUSED, CONTROL = "refused by the chat template", "control tokens in a text"
NOT_ONE_TURN = "a prompt that is not one user turn"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
_ROWS_AT_ONCE = 256  # of a Parquet file
_PROBE = "7x7x7"  # a text that no template contains and every tokenizer gives back


class BadRow(Exception):
    """Why a row gives no pair: one of few fixed wordings, so that rows can be counted by it."""


@dataclass(frozen=True)
class Stored:
    """The columns `OWN` of a row, as far as it has them."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    user_id: int | None
    split: str | None


@dataclass(frozen=True)
class Preference:
    """A prompt with a chosen and one or more rejected answers, as texts."""

    prompt: list[Message]
    chosen: str
    rejected: list[str]
    chosen_reward: float = math.nan
    rejected_reward: list[float] = field(default_factory=list)
    stored: Stored | None = None


@dataclass(frozen=True)
class TokenPair:
    """What DPO trains on. tokenized: the ids were made from the texts; otherwise the row had them."""

    prompt: TokenIds
    chosen: TokenIds
    rejected: list[TokenIds]
    tokenized: bool


# Reading


def read_rows(file: Path) -> Iterator[tuple[str, Fields | None, bytes]]:
    """(place, row, line) of every row of a Parquet file or of JSON lines, a few rows in memory at a time.

    The place is "file:number", counted from 1. row: None for what is no JSON object. line: as it stands in the file, empty
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
        reason = (str(error) or type(error).__name__).split("\n", 1)[0]
        raise UserError(f"{file}: cannot be read, or is damaged ({reason})") from None


def _json_rows(file: Path) -> Iterator[tuple[int, Fields | None, bytes]]:
    with open(file, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # the latter: brackets without end
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
    """Rows as Python values; None for one that Python has none for: a string that is not UTF-8, a date out of its range."""
    with suppress(ValueError, OverflowError):
        return batch.to_pylist()
    if len(batch) == 1:
        return [None]
    return [row for place in range(len(batch)) for row in _dicts(batch.slice(place, 1))]


def read_row(row: Fields, form: str) -> Preference:
    """A row of a layout of `FORMATS`, or of any of them ("auto"). Its texts are not looked into: `ChatCodec.encode` does.

    Raises:
        BadRow: it is not of that layout, or asks nothing.
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
    """As TRL's `maybe_extract_prompt` has it: a prompt inside the answers is what they begin with alike."""
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
    """With the rewards and ids of the row's own columns."""
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
    ids = [row.get(f"{name}_token_ids") for name in ("prompt", "chosen", "rejected")]
    if not all(isinstance(one, list) and one and all(type(i) is int and i >= 0 for i in one) for one in ids):
        return None
    user, split = row.get("user_id"), row.get("split")
    fits = type(user) is int and -(2**63) <= user < 2**63
    return Stored(
        ids[0], ids[1], ids[2], user if fits else None, split if split in ("train", "valid") else None
    )


def _get(row: Fields, name: str) -> Any:
    if row.get(name) is None:
        raise BadRow(f"no field {name!r}")
    return row[name]


def _number(value: Any) -> float:
    """NaN for what is no number, infinities and integers beyond a float's range included."""
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
    """Turns, or characters, that two answers begin with alike.

    Raises:
        BadRow: they are the same.
    """
    if ours == theirs:
        raise BadRow(EQUAL)
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(ours, theirs, strict=False)))


_READERS: dict[str, Callable[[Fields], Preference]] = {
    "trl": _from_trl,
    "nemo": _from_nemo,
    "sharegpt": _from_sharegpt,
}
FORMATS = tuple(_READERS)


# Writing


def write_rows(pair: Fields, codec: ChatCodec, form: str) -> Iterator[tuple[dict[str, Any], bool]]:
    """The rows of a pair, one per rejected text, and whether their texts alone give back its token ids.

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
    """What the trainer of a layout reads."""
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
    # TRL hands the switches to the template
    return {"prompt": asked, "chosen": best, "rejected": other, "chat_template_kwargs": codec.switches}


def _finite(reward: float | None) -> float | None:
    return reward if reward is not None and math.isfinite(reward) else None


# Texts and token ids


class ChatCodec:
    """Texts to token ids under an LLM's chat template, and back.

    An answer becomes what the LLM would have generated: its tokens and the token that ends a turn. Where a template writes
    something after that token (ChatML: a line break), it is left out; the LLM is never asked to generate it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encode_user: Callable[[str], list[int]],
        control_tokens: Sequence[str],
        switches: Mapping[str, Any],
    ):
        """encode_user: token ids of one user turn, ready for the answer; control_tokens: what a template may shape chats with;
        switches: arguments of the template.

        Raises:
            UserError: nothing tells how an answer ends.
        """
        self.has_template = bool(tokenizer.chat_template)
        self.switches = dict(switches)
        self._tokenizer, self._encode_user = tokenizer, encode_user
        self._control = {
            *tokenizer.all_special_ids,
            *tokenizer.convert_tokens_to_ids([token for token in control_tokens if token]),
        } - {tokenizer.unk_token_id, None}
        marks = sorted((token for token in control_tokens if len(token) > 1), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
        self._lead, self._trims, self._end = self._answer_shape()
        self._ends = {self._end, tokenizer.eos_token_id}
        self._head, _, self._tail = self._decode(encode_user(_PROBE)).partition(_PROBE)
        self._num_control: dict[tuple[str, ...], int] = {}

    def encode(self, preference: Preference) -> TokenPair:
        """The stored ids where they are those of the texts under this tokenizer; otherwise the texts' own.

        Raises:
            BadRow: a text is empty or cannot be encoded, the answers are the same, the template refuses the conversation,
                or a text holds control tokens that cannot be broken up.
        """
        stored = preference.stored
        # the ids tell apart what the texts need not: an answer that was cut, one spelled otherwise, an empty one
        if stored and self._belongs(stored, preference):
            if stored.chosen == stored.rejected:
                raise BadRow(EQUAL)
            return TokenPair(stored.prompt, stored.chosen, [stored.rejected], tokenized=False)
        contents = (message["content"] for message in preference.prompt)
        for text in (*contents, preference.chosen, *preference.rejected):
            _check_text(text)
        turns = [{**message, "content": self._disarmed(message["content"])} for message in preference.prompt]
        prompt = self.encode_prompt(turns)
        if self._count(prompt) != self._of_template(tuple(turn["role"] for turn in turns)):
            raise BadRow(CONTROL)
        texts = [self._disarmed(text) for text in (preference.chosen, *preference.rejected)]
        chosen, *rejected = self.encode_answers(texts)
        if any(self._count(answer[:-1]) for answer in (chosen, *rejected)):
            raise BadRow(CONTROL)
        if min(map(len, (chosen, *rejected))) < 2:
            raise BadRow(EMPTY)
        if chosen in rejected:
            raise BadRow(EQUAL)
        return TokenPair(prompt, chosen, list(rejected), tokenized=True)

    def encode_prompt(self, turns: list[Message]) -> list[int]:
        """Token ids of a conversation that ends with a user turn, ready for the answer, with one BOS where there is one.

        Raises:
            BadRow: the template does not take these turns.
        """
        try:
            if [turn["role"] for turn in turns] == ["user"]:
                return self._encode_user(turns[0]["content"])
            if not self.has_template:
                raise BadRow(REFUSED)
            text = self._render(turns, add_generation_prompt=True)
        except TemplateError:
            raise BadRow(REFUSED) from None
        # the template writes the special tokens; letting the tokenizer add its own would double the BOS
        token_ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = self._tokenizer.bos_token_id
        return token_ids if bos is None or bos in token_ids else [bos, *token_ids]

    def encode_answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as the answer to a prompt, with the token that ends it."""
        # behind a token, as in the chat: some tokenizers put a space in front of a text's first word
        anchor = self._tokenizer.convert_ids_to_tokens(self._end)
        whole = [anchor + self._lead + (text.strip() if self._trims else text) for text in texts]
        found: list[list[int]] = self._tokenizer(whole, add_special_tokens=False)["input_ids"]
        return [[*token_ids[1:], self._end] for token_ids in found]

    def answer_text(self, token_ids: TokenIds) -> str:
        """The text of an answer, without the token that ends it."""
        ended = bool(token_ids) and token_ids[-1] in self._ends
        return self._decode(token_ids[: len(token_ids) - ended]).removeprefix(self._lead)

    def user_text(self, token_ids: TokenIds) -> str:
        """The text of a prompt that is one user turn.

        Raises:
            BadRow: it is something else.
        """
        text = self._decode(token_ids)
        inside = text.removeprefix(self._head).removesuffix(self._tail)
        if self._head + inside + self._tail != text or self._count(token_ids) != self._of_template(("user",)):
            raise BadRow(NOT_ONE_TURN)
        return inside

    def _belongs(self, stored: Stored, preference: Preference) -> bool:
        """Whether the ids are the texts under this tokenizer: neither another LLM's, nor of a text that was edited since."""
        if max(map(max, (stored.prompt, stored.chosen, stored.rejected))) >= len(self._tokenizer):
            return False
        try:
            turn = {"role": "user", "content": self.user_text(stored.prompt)}
        except BadRow:
            return False
        texts = [self.answer_text(ids) for ids in (stored.chosen, stored.rejected)]
        return [turn] == preference.prompt and texts == [preference.chosen, *preference.rejected]

    def _answer_shape(self) -> tuple[str, bool, int]:
        """What the template puts before an answer, whether it trims it, and the id of the token that ends it."""
        lead, trims, after = "", False, ""
        if self.has_template:
            question = [{"role": "user", "content": "x"}]
            asked = self._render(question, add_generation_prompt=True)
            whole, spaced = (
                self._render([*question, {"role": "assistant", "content": text}])
                for text in (_PROBE, f"  {_PROBE}  ")
            )
            before, _, after = whole.partition(_PROBE)
            lead = before.removeprefix(asked) if before.startswith(asked) else ""
            trims = f"  {_PROBE}  " not in spaced
        behind = self._tokenizer(after, add_special_tokens=False)["input_ids"]
        end = next((token for token in behind if token in self._control), self._tokenizer.eos_token_id)
        if end is None:
            raise UserError(
                f"{self._tokenizer.name_or_path}: neither an EOS token nor the chat template tells how an answer ends"
            )
        return lead, trims, end

    def _render(self, turns: list[Message], **arguments: Any) -> str:
        return self._tokenizer.apply_chat_template(turns, tokenize=False, **self.switches, **arguments)

    def _decode(self, token_ids: TokenIds) -> str:
        return self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _disarmed(self, text: str) -> str:
        """Control tokens in a text get a space behind their first character, and are plain text from then on."""
        for _ in range(3):  # a space may make another one of two halves
            text, found = self._marks.subn(lambda match: f"{match[0][0]} {match[0][1:]}", text)
            if not found:
                break
        return text

    def _count(self, token_ids: TokenIds) -> int:
        return sum(token in self._control for token in token_ids)

    def _of_template(self, roles: tuple[str, ...]) -> int:
        """Control tokens that the template itself writes for turns of these roles."""
        if roles not in self._num_control:
            turns = [{"role": role, "content": "x"} for role in roles]
            self._num_control[roles] = self._count(self.encode_prompt(turns))
        return self._num_control[roles]


def _check_text(text: str) -> None:
    if not text.strip():
        raise BadRow(EMPTY)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(NOT_UNICODE) from None
