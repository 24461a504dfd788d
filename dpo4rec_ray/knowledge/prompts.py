"""What the LLM is asked about a user, what is encoded for an item, and how a prompt becomes token ids.

Follows KAR's factor prompts (Xi et al., arXiv 2306.10933), as the paper does, but in fewer words: on a CPU every token
of a prompt costs time. Beyond the paper, catalogue text is data and not instruction: `clean_text` takes away whatever
could end or open a chat turn.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dpo4rec_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raise it with any change of wording: texts of two versions are not comparable.
PROMPT_VERSION = 2
FACTORS = {
    "movies": ["genre", "director/actors", "time period/country", "character", "plot/theme", "mood/tone",
               "critical acclaim/award", "production quality", "soundtrack"],
    "books": ["genre", "author", "writing style", "theme", "setting", "length and complexity", "time period",
              "literary quality", "critical acclaim"],
    "short": ["genre", "era", "creator"],  # few words, for small LLMs
    "generic": ["category", "brand or maker", "style", "purpose", "features", "quality", "price", "popularity"],
}  # fmt: skip
_AS_JSON = " Answer with one JSON object that has these words as keys and a string as each value."
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


def user_prompt(
    profile: str,
    titles: Sequence[str],
    ratings: Sequence[float],
    attributes: Sequence[Sequence[str]] | None,
    factors: Sequence[str],
    *,
    show_ratings: bool = True,
    as_json: bool = False,
) -> str:
    """The question about one user. All texts must be clean (`clean_text`); the history is in time order.

    attributes: "facet: value" strings per title, of which the values are shown. None: only titles are shown.
    show_ratings: off for implicit feedback, where all ratings are the same number.
    as_json: ask for one JSON object with a string per factor (`structured.factor_schema`).
    """
    shown = attributes if attributes is not None else [()] * len(titles)
    events = zip(titles, ratings, shown, strict=True)
    history = " ".join(_event(*event, show_rating=show_ratings) for event in events)
    about = f"Profile: {profile}.\n" if profile else ""
    question = f"Analyse this user's preferences, with reasons, by {', '.join(factors)}."
    return f"{about}History: {history}\n{question}{_AS_JSON if as_json else ''}"


def item_prompt(
    title: str, attributes: Sequence[str], factors: Sequence[str], *, as_json: bool = False
) -> str:
    """The question about one item, by the same factors. Title and attributes must be clean."""
    question = f"Describe this item by {', '.join(factors)}."
    return f"Item: {item_text(title, attributes)}\n{question}{_AS_JSON if as_json else ''}"


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


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Every token that a template may use to shape a chat: the special ones, and added ones that look like marks.

    `all_special_tokens` is not enough: Llama 3's turn tokens, for example, are only among the added tokens. Added tokens
    without a mark's delimiter are not included, because some tokenizers add plain words and runs of spaces.
    """
    added = tokenizer.added_tokens_decoder.values()
    marks = [token.content for token in added if token.special or re.search(r"[<>\[\]|]", token.content)]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *marks]))


def encode_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of the prompt as one user turn, ready for the answer: by the chat template if there is one.

    If the tokenizer has a BOS, the ids have exactly one: it is put in front if the template writes none.

    Raises:
        UserError: more than one BOS, unless the template marks every turn with it (as SmolLM2's does).
    """
    text = prompt
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, **TEMPLATE_SWITCHES
        )
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


def _event(title: str, rating: float, attributes: Sequence[str], *, show_rating: bool) -> str:
    values = "; ".join(attribute.partition(": ")[2] for attribute in attributes)
    stars = f", {rating:g} stars" if show_rating else ""
    return f'"{title}"{f" ({values})" if values else ""}{stars};'


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
