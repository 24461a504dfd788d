"""Prompts from lists of titles: what most tests need of a recipe's wording."""

from __future__ import annotations

from collections.abc import Sequence

from dpo4rec_ray.config.texts import PromptSection
from dpo4rec_ray.knowledge.prompts import item_prompt, user_prompt
from dpo4rec_ray.knowledge.wording import Wording, wording_of

Attributes = Sequence[Sequence[str]] | None


def chat_wording(factors: Sequence[str], *, as_json: bool = False) -> Wording:
    return wording_of(PromptSection(factors=tuple(factors)), "chat", as_json=as_json)


def ask(
    profile: str,
    titles: Sequence[str],
    ratings: Sequence[float],
    attributes: Attributes,
    factors: Sequence[str],
    *,
    show_ratings: bool = True,
    as_json: bool = False,
) -> str:
    """The question of the style "chat" about a user. attributes: None: only titles are shown."""
    return user_prompt(
        chat_wording(factors, as_json=as_json),
        profile,
        titles,
        ratings,
        attributes if attributes is not None else [()] * len(titles),
        show_ratings=show_ratings,
    )


def ask_item(title: str, attributes: Sequence[str], factors: Sequence[str], *, as_json: bool = False) -> str:
    return item_prompt(chat_wording(factors, as_json=as_json), title, attributes)
