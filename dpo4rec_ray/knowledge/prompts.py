"""Prompts about users and items as text, what is encoded for an item, and how a prompt becomes token ids.

What they ask is in wording.py. Beyond the paper, catalogue text is data and not instruction: `clean_text` takes away
whatever could end or open a chat turn.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from dpo4rec_ray.config.texts import PromptSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.wording import Wording

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Marks that chat formats put between turns, whether or not this tokenizer has them as tokens: <|x|>, <s>,
# <x_of_turn>, [INST], [SEP], <<SYS>>, <think>. The name inside stays, so that a title that is such a mark does not vanish.
_MARKS = re.compile(
    r"<\|(?P<bar>[^<>|]*)\|>"
    r"|</?(?P<tag>s|bos|eos|pad|unk|mask|think|tool_call|tool_response|(?:start|end)_of_\w+)>"
    r"|<</?(?P<sys>SYS)>>"
    r"|\[/?(?P<bracket>INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|CLS|SEP|PAD|UNK|MASK|BOS|EOS)\]",
    re.IGNORECASE,
)
# "Assistant: ..." opens a turn for models that were trained on plain-text dialogue; so does a heading with ###.
_ROLES = re.compile(r"\b(system|user|human|assistant|instruction|response)\s*:", re.IGNORECASE)
_HEADINGS = re.compile(r"#{2,}")
# Switches of chat templates; a template ignores those that it does not know. Qwen3 must not write down its thoughts:
# samples have no room for them. Llama 3.2 would write today's date, and a run resumed tomorrow would ask other questions; it
# gets Llama 3.1's date.
TEMPLATE_SWITCHES = {"enable_thinking": False, "date_string": "26 Jul 2024"}
# Titles are shorter. Without a limit, one absurd text would push everything else out of the prompt.
MAX_CHARS = 300
# Unicode categories of characters that cannot be seen:
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, lone surrogate, line, paragraph


Message = dict[str, str]  # a turn of a chat: its role and its content


@dataclass(frozen=True)
class Prompt:
    """What an LLM is asked, before it has the form of a chat or of one text.

    Attributes:
        question: the user's turn, or the text that a base LLM goes on with.
        lead_in: first words of the answer, without a blank at either end; "": none.
        system: the system's turn; "": none.
        examples: questions and whole answers that stand before the question.
    """

    question: str
    lead_in: str = ""
    system: str = ""
    examples: tuple[tuple[str, str], ...] = ()


def user_prompt(
    wording: Wording,
    profile: str,
    titles: Sequence[str],
    ratings: Sequence[float],
    attributes: Sequence[Sequence[str]],
    *,
    like_at: float | None = None,
    show_ratings: bool = True,
    typical: Sequence[str] = (),
    date: str = "",
) -> str:
    """The question about one user. All texts must be clean (`clean_text`); the history is in time order.

    attributes: "facet: value" strings per title, of which the values are shown. Empty ones: only titles are shown.
    like_at: the least rating of a liked event; None: implicit feedback, everything is liked.
    show_ratings: off for implicit feedback, where all ratings are the same number.
    typical: values of attributes for {typical}.
    """
    events = [_event(title, values) for title, values in zip(titles, attributes, strict=True)]
    rated = list(zip(events, ratings, strict=True))
    return wording.user.fill(
        {
            "profile": profile,
            "history": " ".join(
                f"{event}{f', {rating:g} stars' if show_ratings else ''};" for event, rating in rated
            ),
            "liked": "; ".join(event for event, rating in rated if likes(rating, like_at)),
            "disliked": "; ".join(event for event, rating in rated if not likes(rating, like_at)),
            "typical": ", ".join(typical),
            "factors": ", ".join(wording.factors),
            "date": date,
        }
    )


def likes(rating: float, like_at: float | None) -> bool:
    """Whether a rating means that the item was liked; without a least rating everything is."""
    return like_at is None or rating >= like_at


def item_prompt(wording: Wording, title: str, attributes: Sequence[str]) -> str:
    """The question about one item, by the same factors. Title and attributes must be clean."""
    item = _ROLES.sub(r"\1 -", item_text(title, attributes))  # here the facets themselves are shown
    return wording.item.fill({"item": item, "factors": ", ".join(wording.factors)})


def fit_history(
    encode: Callable[[int], list[int]], num_events: int, max_tokens: int
) -> tuple[list[int], int]:
    """The longest prompt that fits, and how many of the oldest events it leaves out. The question always stays whole.

    encode: k -> token ids of the prompt without its k oldest events, k in [0, num_events]. A larger k never gives a longer
    prompt. A prompt that does not fit even without events is returned as it is.
    """
    token_ids = encode(0)
    if len(token_ids) <= max_tokens or not num_events:
        return token_ids, 0
    low, high = 1, num_events  # the answer is in [low, high], or nothing fits
    while low < high:
        middle = (low + high) // 2
        if len(encode(middle)) <= max_tokens:
            high = middle
        else:
            low = middle + 1
    return encode(low), low


def item_text(title: str, attributes: Sequence[str]) -> str:
    """What is encoded for an item: 'Toy Story (1995). genre: Animation, Comedy. era: 1990s.'"""
    facets: dict[str, list[str]] = {}
    for attribute in attributes:
        facet, _, value = attribute.partition(": ")
        facets.setdefault(facet, []).append(value)
    return " ".join([f"{title}.", *(f"{facet}: {', '.join(values)}." for facet, values in facets.items())])


def clean_text(text: str, special_tokens: Sequence[str]) -> str:
    """Catalogue text on one line, in which nothing can open or end a chat turn or a quoted title.

    Compatibility characters are folded (NFKC), so that look-alikes of a mark are treated as the mark. Control
    and format characters and line breaks become a space, `"` becomes `'`, special tokens and marks of known
    chat formats lose their delimiters, and role labels lose their colon. At most MAX_CHARS characters stay; a
    longer text is cut and ends in "...".

    special_tokens: `control_tokens(tokenizer)`, or the whole list where there is no tokenizer yet.
    """
    tokens = _any_of(tuple(special_tokens))
    while True:  # without one mark, two halves of another may come together
        cleaned = _clean_once(text, tokens)
        if cleaned == text:
            return cleaned
        text = cleaned


def clean_attribute(attribute: str, special_tokens: Sequence[str]) -> str:
    """A "facet: value" string, cleaned on both sides of the colon, which makes no role label of a facet named "system"."""
    facet, colon, value = attribute.partition(": ")
    return colon.join(clean_text(part, special_tokens) for part in ((facet, value) if colon else (facet,)))


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Every token that a template may use to shape a chat: the special ones, and added ones that look like marks.

    `all_special_tokens` is not enough: Llama 3's turn tokens, for example, are only among the added tokens. Added tokens
    without a mark's delimiter are not included, because some tokenizers add plain words and runs of spaces.
    """
    added = tokenizer.added_tokens_decoder.values()
    marks = [token.content for token in added if token.special or re.search(r"[<>\[\]|]", token.content)]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *marks]))


def style_of(tokenizer: PreTrainedTokenizerBase, wanted: str = "auto") -> str:
    """The style of prompts: the recipe's, or for "auto" what the tokenizer is made for."""
    if wanted != "auto":
        return wanted
    return "chat" if tokenizer.chat_template else "completion"


def style_remarks(prompt: PromptSection, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the user should know about how this LLM is asked."""
    found = []
    if not tokenizer.chat_template and prompt.style == "chat":
        found.append(
            "it has no chat template, so it is a base LLM that goes on with texts and hardly answers questions; set "
            'prompt.style = "completion" (or "auto"), with a prompt.lead_in if prompt.template is your own'
        )
    elif not tokenizer.chat_template and prompt.template and prompt.lead_in == "auto":
        found.append(
            "it has no chat template, so it goes on with the text of prompt.template; set prompt.lead_in to the words "
            'that its answers begin with, such as "This user likes" ("" if the template ends with them)'
        )
    if prompt.system and tokenizer.chat_template and not takes_system(tokenizer):
        found.append("its chat template has no system's turn; prompt.system opens the first user's turn")
    return found


def encode_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of the prompt as one user turn, ready for the answer: by the chat template if there is one.

    Raises:
        UserError: as `encode_prompt`.
    """
    return encode_prompt(tokenizer, Prompt(prompt), "chat")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, style: str) -> list[int]:
    """Token ids of a prompt, ready for the answer. The last ones are the lead-in's.

    If the tokenizer has a BOS, the ids have exactly one: it is put in front if the template writes none.

    Raises:
        UserError: more than one BOS, unless the template marks every turn with it (as SmolLM2's does).
    """
    text = prompt_text(tokenizer, prompt, style)
    # The template writes the special tokens. If the tokenizer added its own, there would be two BOS.
    token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is None:
        return token_ids
    count = token_ids.count(bos)
    if count > 1 and not _bos_marks_turns(tokenizer):
        raise UserError(
            f"the prompt holds {count} BOS tokens {tokenizer.bos_token!r} where there must be one; correct the "
            f"chat template of {tokenizer.name_or_path or 'the tokenizer'}, or clean the text it is given"
        )
    return token_ids if count else [bos, *token_ids]


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, style: str) -> str:
    """The text that is tokenised: turns under the chat template, or examples, question and lead-in one after the other.

    A question in the style "chat" for a tokenizer without a chat template is that question alone, with its lead-in behind it.
    """
    if style == "completion" or not tokenizer.chat_template:
        asked = [_continued(question, answer) for question, answer in prompt.examples]
        return "\n\n".join(
            [prompt.system] * bool(prompt.system) + [*asked, _continued(prompt.question, prompt.lead_in)]
        )
    turns = messages(prompt, with_system=takes_system(tokenizer))
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, **TEMPLATE_SWITCHES)
    if not prompt.lead_in:
        return render(turns, add_generation_prompt=True)
    opened = render(turns[:-1], add_generation_prompt=True)
    begun = render(turns, continue_final_message=True)  # with the template's own blank before an answer
    # Where answers open with more than a turn's mark, such as Qwen3's empty thoughts, a template may leave it out.
    return begun if begun.startswith(opened.rstrip()) else f"{opened}{prompt.lead_in}"


def messages(prompt: Prompt, *, with_system: bool = True) -> list[Message]:
    """The turns of a chat; with a lead-in the last one is an answer that has begun.

    with_system: off where the chat template has no system's turn; its text then opens the first user's turn.
    """
    turns: list[Message] = [
        {"role": role, "content": text}
        for pair in prompt.examples
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    turns.append({"role": "user", "content": prompt.question})
    if prompt.system and with_system:
        turns.insert(0, {"role": "system", "content": prompt.system})
    elif prompt.system:
        turns[0]["content"] = f"{prompt.system}\n\n{turns[0]['content']}"
    if prompt.lead_in:
        turns.append({"role": "assistant", "content": prompt.lead_in})
    return turns


@functools.lru_cache(maxsize=8)
def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has a place for a system prompt: some refuse it, some leave it out without a word."""
    turns = [{"role": "system", "content": "7x7x7"}, {"role": "user", "content": "x"}]
    try:
        return "7x7x7" in tokenizer.apply_chat_template(turns, tokenize=False, **TEMPLATE_SWITCHES)
    except TemplateError:
        return False


def _continued(text: str, answer: str) -> str:
    """A text and what follows it. No blank at the end: it belongs to the token of the word that comes."""
    return text.rstrip(" ") if not answer else f"{text}{'' if text[-1:].isspace() else ' '}{answer}"


def _event(title: str, attributes: Sequence[str]) -> str:
    values = "; ".join(attribute.partition(": ")[2] for attribute in attributes)
    return f'"{title}"{f" ({values})" if values else ""}'


def _clean_once(text: str, tokens: re.Pattern[str] | None) -> str:
    text = unicodedata.normalize("NFKC", text)
    text = "".join(" " if unicodedata.category(char) in _UNSEEN else char for char in text)
    text = _cut(" ".join(text.split()))
    text = _MARKS.sub(lambda match: match[match.lastgroup or 0], text)
    text = _ROLES.sub(r"\1 -", _HEADINGS.sub("#", text))
    return " ".join(_without_tokens(text, tokens).replace('"', "'").split())


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 3].rstrip() + "..."


def _without_tokens(text: str, tokens: re.Pattern[str] | None) -> str:
    """Special tokens lose their delimiters. A token that is a bare word has none, so it is taken out."""

    def disarmed(match: re.Match[str]) -> str:
        inner = " ".join(re.findall(r"\w+", match[0])).strip("_ ")
        return "" if inner == match[0] else f" {inner} "

    return tokens.sub(disarmed, text) if tokens else text


@functools.lru_cache(maxsize=8)
def _any_of(special_tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    """A pattern for any of the tokens in upper or lower case, the longest first; None if there are no tokens.

    Cached because some tokenizers have thousands.
    """
    tokens = sorted({token for token in special_tokens if token.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)), re.IGNORECASE) if tokens else None


@functools.lru_cache(maxsize=8)
def _bos_marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template opens every turn with a BOS: then a longer conversation holds more of them."""
    if not tokenizer.chat_template:
        return False
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    one, three = (tokenizer.apply_chat_template(part, tokenize=False) for part in (turns[:1], turns))
    return three.count(tokenizer.bos_token) > one.count(tokenizer.bos_token)
