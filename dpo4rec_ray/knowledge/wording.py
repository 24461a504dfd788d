"""What is asked: the wordings by style and domain, and what a recipe's [prompt] puts in their place.

The chat wording follows KAR's factor prompts (Xi et al., arXiv 2306.10933), as the paper does, but in fewer words: on a CPU
every token of a prompt costs time. Base LLMs are not asked: they go on with a text about the user (`completion`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dpo4rec_ray.config.texts import GenerateSection, PromptSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.templates import Template, read_template

# Raise it with any change of a wording below, or of how histories are written: texts of two versions are not comparable.
# Own templates, lead-ins and factors need no version: they stand in the recipe.
PROMPT_VERSION = 3
FACTORS = {
    "movies": ["genre", "director/actors", "time period/country", "character", "plot/theme", "mood/tone",
               "critical acclaim/award", "production quality", "soundtrack"],
    "books": ["genre", "author", "writing style", "theme", "setting", "length and complexity", "time period",
              "literary quality", "critical acclaim"],
    "short": ["genre", "era", "creator"],  # few words, for small LLMs
    "generic": ["category", "brand or maker", "style", "purpose", "features", "quality", "price", "popularity"],
}  # fmt: skip
# What items are called in texts that base LLMs go on with. Own lists of factors: items.
NOUNS = {"movies": "movies", "short": "movies", "books": "books"}
OF_USER = ("profile", "history", "liked", "disliked", "typical", "factors", "date")  # placeholders
OF_HISTORY = ("history", "liked", "typical")  # at least one of them
OF_ITEM = ("item", "factors")
MAY_BE_EMPTY = ("profile", "liked", "disliked", "typical", "date")
AS_JSON = " Answer with one JSON object that has these words as keys and a string as each value."
LIKES = "This user likes"


class Words(NamedTuple):
    """A style's own wording."""

    user: str
    item: str
    lead_in: str


CHAT = Words(
    "Profile: {profile}.\nHistory: {history}\nAnalyse this user's preferences, with reasons, by {factors}.",
    "Item: {item}\nDescribe this item by {factors}.",
    "",
)


def completion(noun: str) -> Words:
    """The text that a base LLM goes on with, about movies, books or items.

    Chosen on MovieLens-1M with Gemma 3 270M (64 to 80 users, docs/texts-and-llms.md): a question as above gets no answer; titles
    alone are hardly read; liked and disliked apart, and attributes in a line of their own, are.
    """
    return Words(
        f"{noun.capitalize()} that this user liked: {{liked}}.\n"
        f"{noun.capitalize()} that this user disliked: {{disliked}}.\n"
        "Typical of what this user liked: {typical}.\n"
        f"Summary of this user's taste in {noun} ({{factors}}):",
        "Item: {item}\nDescription of this item ({factors}):",
        LIKES,
    )


@dataclass(frozen=True)
class Wording:
    """What a recipe asks an LLM.

    Attributes:
        style: "chat" or "completion".
        lead_in: first words of the answer about a user.
    """

    style: str
    user: Template
    item: Template
    factors: list[str]
    lead_in: str
    system: str


def factor_list(prompt: PromptSection) -> list[str]:
    """The words of the recipe's factors. Raises UserError for a name that no list has."""
    if not isinstance(prompt.factors, str):
        return list(prompt.factors)
    if prompt.factors not in FACTORS:
        raise UserError(
            f"prompt.factors = {prompt.factors!r} is unknown; known: {', '.join(FACTORS)}; or a list of your own words"
        )
    return FACTORS[prompt.factors]


def wording_of(prompt: PromptSection, style: str, *, as_json: bool = False) -> Wording:
    """The wording of a recipe in a style, "chat" or "completion".

    as_json: the styles' own wordings ask for one JSON object with a string per factor; an own template says it itself.

    Raises:
        UserError: a template cannot be used (`read_template`), or there is no such list of factors.
    """
    noun = NOUNS.get(prompt.factors, "items") if isinstance(prompt.factors, str) else "items"
    own = completion(noun) if style == "completion" else CHAT
    suffix = AS_JSON if as_json else ""
    user = prompt.template or own.user + suffix
    lead_in = prompt.lead_in
    if lead_in == "auto":
        lead_in = "" if prompt.template or as_json else own.lead_in
    return Wording(
        style,
        read_template("prompt.template", user, OF_USER, one_of=OF_HISTORY, optional=MAY_BE_EMPTY),
        read_template(
            "prompt.item_template", prompt.item_template or own.item + suffix, OF_ITEM, one_of=("item",)
        ),
        factor_list(prompt),
        lead_in,
        prompt.system,
    )


def check_prompt(prompt: PromptSection, generate: GenerateSection) -> None:
    """What can be known of the prompts before anything starts.

    Raises:
        UserError: a template cannot be used, or settings contradict each other.
    """
    wording = wording_of(prompt, "completion" if prompt.style == "completion" else "chat")
    if "date" in wording.user.names and not prompt.date:
        raise UserError(
            "prompt.template shows {date}, but prompt.date is not set; set it, or leave {date} out"
        )
    if generate.format == "json" and wording.lead_in and prompt.lead_in != "auto":
        raise UserError(
            f'prompt.lead_in = {prompt.lead_in!r}, but generate.format = "json" lets an answer be nothing but JSON; set '
            'prompt.lead_in = ""'
        )
    if generate.format == "json" and prompt.examples:
        raise UserError(
            f'prompt.examples = {prompt.examples} shows sentences, but generate.format = "json"; set it to 0'
        )
