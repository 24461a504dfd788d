"""Texts to token ids under an LLM's chat template, and back.

Texts are not trusted: what looks like a control token inside a text is broken up before it is tokenised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.exchange.preference_rows import (
    CONTROL,
    EMPTY,
    EQUAL,
    NOT_ONE_TURN,
    NOT_UNICODE,
    REFUSED,
    BadRow,
    Message,
    Preference,
    Stored,
    TokenIds,
    TokenPair,
)
from dpo4rec_ray.knowledge.prompts import TEMPLATE_SWITCHES, control_tokens, encode_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "7x7x7"  # a text that no template contains and every tokenizer gives back


class ChatCodec:
    """Texts to token ids under an LLM's chat template, and back.

    An answer becomes what the LLM would have generated: its tokens and the token that ends a turn. What a template writes
    after that token (ChatML: a line break) is left out, because the LLM never generates it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Raises UserError: neither the tokenizer nor the template says how an answer ends."""
        self.has_template = bool(tokenizer.chat_template)
        self._tokenizer = tokenizer
        shaping = control_tokens(tokenizer)
        self._control = {
            *tokenizer.all_special_ids,
            *tokenizer.convert_tokens_to_ids([token for token in shaping if token]),
        } - {tokenizer.unk_token_id, None}
        marks = sorted((token for token in shaping if len(token) > 1), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
        self._lead, self._trims, self._end = self._answer_shape()
        self._ends = {self._end, tokenizer.eos_token_id}
        self._head, _, self._tail = self._decode(encode_chat(tokenizer, _PROBE)).partition(_PROBE)
        self._num_control: dict[tuple[str, ...], int] = {}

    def encode(self, preference: Preference) -> TokenPair:
        """The stored ids where they belong to the texts under this tokenizer; otherwise ids made from the texts.

        Raises:
            BadRow: a text is empty or cannot be encoded, the answers are the same, the template refuses the conversation,
                or a text holds control tokens that cannot be broken up.
        """
        stored = preference.stored
        # ids can differ where texts are equal: an answer that was cut, one of other tokens, an empty one
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
                return encode_chat(self._tokenizer, turns[0]["content"])
            if not self.has_template:
                raise BadRow(REFUSED)
            text = self._render(turns, add_generation_prompt=True)
        except TemplateError:
            raise BadRow(REFUSED) from None
        # the template writes the special tokens; the tokenizer must not add its own, or there would be two BOS
        token_ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = self._tokenizer.bos_token_id
        return token_ids if bos is None or bos in token_ids else [bos, *token_ids]

    def encode_answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as the answer to a prompt, with the token that ends it."""
        # after a token, as in the chat: some tokenizers put a space before the first word of a text
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
        """Whether the ids are those of the texts under this tokenizer: not of another LLM, and not of a text that was edited."""
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
                f"{self._tokenizer.name_or_path}: neither an EOS token nor the chat template says how an answer ends"
            )
        return lead, trims, end

    def _render(self, turns: list[Message], **arguments: Any) -> str:
        return self._tokenizer.apply_chat_template(turns, tokenize=False, **TEMPLATE_SWITCHES, **arguments)

    def _decode(self, token_ids: TokenIds) -> str:
        return self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _disarmed(self, text: str) -> str:
        """Control tokens in a text get a space after their first character, which makes them plain text."""
        for _ in range(3):  # the space may complete another control token
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
