"""Templates: strict about placeholders, and blind to what is put in."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.templates import read_template

KNOWN = ("profile", "history", "factors")


def filled(text: str, **values: str) -> str:
    template = read_template("prompt.template", text, KNOWN, optional=("profile",))
    return template.fill({"profile": "", "history": "", "factors": "", **values})


def test_placeholders_become_values_and_doubled_braces_braces() -> None:
    assert filled("{{x}} {history}|{factors}|{history}", history="A", factors="b, c") == "{x} A|b, c|A"


def test_a_line_whose_optional_placeholder_is_empty_is_left_out() -> None:
    text = "About {profile}.\nHistory: {history}\n\nEnd"
    assert filled(text, profile="a nurse", history="A") == "About a nurse.\nHistory: A\n\nEnd"
    assert filled(text) == "History: \n\nEnd"  # a history may be empty, and its line stays


@given(st.text())
def test_data_is_never_read_as_a_template(text: str) -> None:
    for value in (text, "{history} {0} {factors.x} {", "}} {{", "{profile!r:>10}"):
        assert filled("<{history}>", history=value) == f"<{value}>"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{titles} {history}",
            "prompt.template: {titles} is no placeholder that is known; known: {profile}, {history}, ",
        ),
        ("{history} {}", "{} is no placeholder"),
        ("{history} {0}", "{0} is no placeholder"),
        ("{history.__class__}", "{history.__class__} is no placeholder"),
        ("{history[0]}", "{history[0]} is no placeholder"),
        ("{history!r}", "{history!r} is no placeholder"),
        ("{history:>9}", "{history:>9} is no placeholder"),
        ("a\nb } {history}", "'b } {history}': Single '}' encountered"),
        ("{history", "expected '}' before end of string"),
        ('{"genre": 1} {history}', "a brace that is text is written {{ or }}"),
        ("What does the user like?", "prompt.template holds no {history}: everybody would be asked the same"),
        ("{{history}}", "holds no {history}"),
    ],
)
def test_what_is_no_template_is_refused_with_what_is_known(text: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as error:
        read_template("prompt.template", text, KNOWN, one_of=("history",))
    assert "\n" not in str(error.value)
