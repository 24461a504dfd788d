from __future__ import annotations

import pytest

from dpo4rec_ray.core.joins import JoinSide, check_join, way_to_match
from dpo4rec_ray.errors import UserError


def check(
    matched: int, left: int, right: int, ours: list[str] | None = None, theirs: list[str] | None = None
):
    check_join(
        "item",
        matched,
        JoinSide("the interactions", left, lambda: ours or ["7.0"]),
        JoinSide("items.csv", right, lambda: theirs or ["7"]),
    )


@pytest.mark.parametrize(
    ("left", "right", "ours", "theirs", "way"),
    [
        (30, 30, "7.0", "7", 'without ".0"'),
        (30, 30, "7", "7.00", 'without ".0"'),
        (30, 30, " 7", "7", "without blanks"),
        (30, 30, "b000", "B000", "if case did not matter"),
        (30, 30, "0007", "7", "without leading zeros"),
        (30, 30, "'7'", "7", "without quotes"),
    ],
)  # fmt: skip
def test_a_join_that_matches_nothing_shows_an_id_of_either_side(
    left: int, right: int, ours: str, theirs: str, way: str
):
    with pytest.raises(UserError) as error:
        check(0, left, right, [ours], [theirs])
    message = str(error.value)
    assert message.startswith(f"items.csv: 0 of {left} item ids of the interactions are in it")
    assert repr(ours) in message and repr(theirs) in message and f"would match {way}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("matched", "left", "right", "broken"),
    [
        (1, 1000, 1000, True), (9, 1000, 1000, True), (10, 1000, 1000, False),
        (10, 10**6, 10, False),  # a small file about a part of a large catalogue
        (5, 5, 10**6, False),  # a large file about a small catalogue
        (0, 10**6, 1, True), (0, 0, 10, False), (0, 10, 0, False), (1, 1, 1, False),
    ],
)  # fmt: skip
def test_almost_nothing_is_a_share_of_the_smaller_side(matched: int, left: int, right: int, broken: bool):
    if broken:
        with pytest.raises(UserError, match=f"{matched} of {left} item ids"):
            check(matched, left, right)
    else:
        check(matched, left, right)


def test_ids_of_another_kind_match_in_no_way():
    assert way_to_match(["7", "8"], ["B00X", "B00Y"]) == ""
    with pytest.raises(
        UserError, match=r"items\.csv has 'B00X'; write them in the same way, or run without items\.csv$"
    ):
        check(0, 5, 5, ["7"], ["B00X"])
