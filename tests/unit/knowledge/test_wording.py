"""What a recipe's [prompt] asks, in both styles."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dpo4rec_ray.config.texts import GenerateSection, PromptSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.prompts import item_prompt, user_prompt
from dpo4rec_ray.knowledge.wording import FACTORS, LIKES, NOUNS, check_prompt, factor_list, wording_of

TITLES, STARS = ["Heat (1995)", "Big (1988)", "Toys {x} (1992)"], [5.0, 4.0, 1.0]
VALUES = [["genre: Crime", "era: 1990s"], ["genre: Comedy", "era: 1980s"], ["genre: Comedy", "era: 1990s"]]


def asked(style: str = "chat", like_at: float | None = 4, profile: str = "", **keys: Any) -> str:
    prompt = PromptSection(**{"factors": ("genre", "mood"), **keys})
    return user_prompt(
        wording_of(prompt, style),
        profile,
        TITLES,
        STARS,
        VALUES if prompt.item_attributes else [()] * 3,
        like_at=like_at,
        typical=["Crime", "1980s"],
        show_ratings=prompt.ratings,
        date=prompt.date,
    )


def test_an_own_template_is_taken_as_it_is() -> None:
    text = asked(
        template="On {date}, {profile}\nsaw {history}\nliked {liked}\nnot {disliked}\ntypical {typical}\nby {factors} {{}}",
        date="1 May 2001",
        item_attributes=True,
    )
    assert text == (  # no profile: its line is left out
        'saw "Heat (1995)" (Crime; 1990s), 5 stars; "Big (1988)" (Comedy; 1980s), 4 stars; "Toys {x} (1992)" (Comedy; 1990s), '
        "1 stars;\n"
        'liked "Heat (1995)" (Crime; 1990s); "Big (1988)" (Comedy; 1980s)\n'
        'not "Toys {x} (1992)" (Comedy; 1990s)\n'
        "typical Crime, 1980s\n"
        "by genre, mood {}"
    )


def test_everything_is_liked_where_feedback_is_implicit() -> None:
    text = asked(like_at=None, template="{liked}\nnot {disliked}")
    assert text == '"Heat (1995)"; "Big (1988)"; "Toys {x} (1992)"'


@pytest.mark.parametrize("factors", [*FACTORS, ("genre", "pace")])
def test_a_base_llm_gets_a_text_that_a_lead_in_ends(factors: Any) -> None:
    prompt = PromptSection(factors=factors)
    wording = wording_of(prompt, "completion")
    assert wording.lead_in == LIKES
    text = asked("completion", factors=factors)
    noun = NOUNS.get(factors, "items") if isinstance(factors, str) else "items"
    assert text.startswith(f'{noun.capitalize()} that this user liked: "Heat (1995)"; "Big (1988)".\n')
    assert text.endswith(f"Summary of this user's taste in {noun} ({', '.join(factor_list(prompt))}):")
    assert "Crime, 1980s" in text and "Heat (1995)" in text


def test_an_own_template_has_no_lead_in_of_its_own_accord() -> None:
    own = PromptSection(template="{history}. This user likes")
    assert wording_of(own, "completion").lead_in == ""
    assert wording_of(PromptSection(), "chat").lead_in == ""
    assert wording_of(PromptSection(lead_in="He likes"), "chat").lead_in == "He likes"
    assert wording_of(PromptSection(lead_in=""), "completion").lead_in == ""
    assert wording_of(PromptSection(), "completion", as_json=True).lead_in == ""


def test_an_own_question_about_items() -> None:
    wording = wording_of(PromptSection(item_template="{item} Why? ({factors})", factors=("genre",)), "chat")
    assert item_prompt(wording, "Heat", ["genre: Crime"]) == "Heat. genre: Crime. Why? (genre)"


def test_own_factors_and_unknown_lists() -> None:
    assert factor_list(PromptSection(factors=("pace", "humour"))) == ["pace", "humour"]
    with pytest.raises(UserError, match=r"prompt\.factors = 'film' is unknown; known: movies, books"):
        factor_list(PromptSection(factors="film"))
    for wrong in ((), ("genre", " ")):
        with pytest.raises(ValidationError, match="at least one word"):
            PromptSection(factors=wrong)


@pytest.mark.parametrize("wrong", ["This user likes ", " x"])
def test_a_lead_in_with_a_blank_at_an_end_is_refused(wrong: str) -> None:
    with pytest.raises(ValidationError, match="ends in a blank"):
        PromptSection(lead_in=wrong)


@pytest.mark.parametrize(
    ("prompt", "form", "said"),
    [
        ({"template": "Likes?"}, "text", r"holds no \{history\} or \{liked\} or \{typical\}"),
        ({"item_template": "What is it?"}, "text", r"prompt.item_template holds no \{item\}"),
        ({"item_template": "{history}"}, "text", r"prompt.item_template: \{history\} is no placeholder"),
        ({"template": "{date} {history}"}, "text", "prompt.date is not set"),
        ({"lead_in": "He likes"}, "json", "nothing but JSON"),
        ({"examples": 2}, "json", "prompt.examples = 2 shows sentences"),
    ],
)
def test_what_contradicts_itself_is_refused(prompt: dict[str, Any], form: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_prompt(PromptSection(**prompt), GenerateSection(format=form))
