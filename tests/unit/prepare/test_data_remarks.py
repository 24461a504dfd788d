from __future__ import annotations

import time
from typing import Any

import pyarrow as pa
import pytest

from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare.data_remarks import check_positives, remarks

SOUND: dict[str, Any] = {
    "notes": [], "times": (1_500_000_000, 1_600_000_000), "ratings": (1.0, 5.0), "rows_read": 1000, "rows_kept": 1000,
    "events": 1000, "positive_events": 400, "quarantined": {}, "repeated_events": 0, "in_core": 1000, "items": 50, "users": 100,
    "other_files": {"items": {}, "users": {}, "lists": {}}, "untitled_items": 25, "items_not_in_files": 25,
    "users_without_profile": 50, "users_in_lists": 100, "users_without_events": 50,
}  # fmt: skip
TITLES = [f"Title {n}" for n in range(50)]
NOW_S = int(time.time())


def said(change: dict[str, Any], titles: list[str] | None = None, **data: Any) -> list[str]:
    config = Config.model_validate({"table": data.pop("table", {}), "data": data})
    absent = [f"{n:03d}" for n in range(50)]
    return remarks(config, {**SOUND, **change}, pa.chunked_array([titles or TITLES]), absent, ["7", "8"])


def test_nothing_is_said_about_sound_data():
    assert said({}) == []
    assert (
        said({"ratings": (1.0, 1.0), "positive_events": 1000}, positive_rating=1) == []
    )  # implicit feedback
    assert said({"times": (NOW_S - 10, NOW_S + 3600)}) == []
    assert said({"times": (0, 0)}, dataset="table", table={"timestamp": ""}) == []  # no times are set
    assert said({"quarantined": {"bad number": 50, "empty line": 900}}) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"times": (0, 0)}, "all events have the same time (0 s): there is no order in time"),
        ({"times": (1_500_000_000, 1_500_000_000)}, "all events have the same time"),
        ({"times": (1_500_000_000, NOW_S + 3 * 86400)}, "in the future; check the unit"),
        ({"times": (1_500_000, 1_600_000)}, "all events are from before 1980 (from 1970-01-18 to 1970-01-19)"),
        ({"times": (0, 1_600_000_000)}, "some events are from before 1980 (from 1970-01-01 to 2020-09-13)"),
        ({"positive_events": 0, "ratings": (0.0, 1.0)}, "no event is positive: ratings are from 0 to 1, and "
         "data.positive_rating = 4; set it to a rating that means liked"),
        ({"positive_events": 0, "ratings": (1.0, 1.0)}, "set it to 1, which every event without a rating counts as"),
        ({"positive_events": 1000, "ratings": (4.0, 5.0)}, "all 1,000 events are positive"),
        ({"positive_events": 1000, "ratings": (5.0, 5.0)}, "all events have the rating 5"),
        ({"quarantined": {"bad number": 51}}, "51 of 1,000 rows were damaged"),
        ({"filtered": {"repeated events": 501}, "repeated_events": 501}, "501 of 1,000 events are repeated ones of the same user "
         "and item, and were left out"),
        ({"in_core": 9}, "9 of 1,000 events are left: most users have a single event, which gives no list; is the users' "
         "column a session, or the wrong column?"),
        ({"users_without_profile": 51}, "51 of 100 users have no profile"),
        ({"users_without_events": 51}, "51 of 100 users of the lists have no event"),
        ({"notes": ["i.csv: fields are separated by tabs"]}, "i.csv: fields are separated by tabs"),
    ],
)  # fmt: skip
def test_each_strange_number_is_one_sentence(change: dict[str, Any], words: str):
    (sentence,) = said(change)
    assert words in sentence and "\n" not in sentence


def test_items_without_a_title_are_shown_beside_titles_without_an_event():
    begin = "26 of 50 items have no title and go by their ids: "
    end = ", and '7' of the items' file has no event, which would match without leading zeros"
    for absent, why in (
        (26, "'000' is not in the items' file"),
        (3, "the title of 23 is empty in the items' file, and 3 are not in it, such as '000'"),
    ):
        assert said({"untitled_items": 26, "items_not_in_files": absent}) == [begin + why + end]


def test_titles_that_are_empty_are_not_said_to_be_missing_from_the_file():
    empty = {"untitled_items": 26, "items_not_in_files": 0}
    told = "26 of 50 items have no title and go by their ids: their title is empty in the items' file"
    assert said(empty) == [told]
    assert said(empty, dataset="table") == [told]
    assert said(empty, dataset="table", table={"title": ""}) == []  # no titles are set


def test_a_k_core_is_blamed_only_where_one_is_set():
    assert said({"in_core": 9}, user_core=5) == [
        "the k-core leaves 9 of 1,000 events; lower data.user_core = 5 or data.item_core = 0"
    ]
    (sentence,) = said({"in_core": 9}, dataset="table", table={"user": "session"})
    assert sentence.endswith("is 'session' (table.user) a session, or the wrong column?")


def test_titles_that_are_all_the_same():
    assert said({}, TITLES[:24] + ["unknown"] * 26) == ["26 of 50 items have the same title: 'unknown'"]
    assert said({}, TITLES[:25] + ["unknown"] * 25) == []


def test_repeated_events_that_count_are_no_damage():
    (sentence,) = said({"repeated_events": 900}, protocol="paper")
    assert "900 of 1,000 events are repeated ones of the same user and item, and were kept" in sentence


def test_no_positive_candidate_is_an_error():
    sound = {**SOUND, "positive_share": 0.1}
    check_positives(Config(), sound)
    check_positives(
        Config(), {**sound, "positive_events": 0}
    )  # logged lists may have labels and the events none
    for change, sections, told in (
        ({"positive_events": 0}, {}, "no event is positive: ratings are from 1 to 5"),
        ({}, {}, "all 400 positive events are in histories; lower data.max_history = 30"),
        ({}, {"logged": {"file": "lists.csv"}}, "no candidate of logged.file has a label above 0"),
    ):
        with pytest.raises(UserError, match=told):
            check_positives(Config.model_validate(sections), {**sound, "positive_share": 0.0, **change})
