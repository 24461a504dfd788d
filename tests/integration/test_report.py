"""report.html of a real run in headless Chromium: it draws, searches, sorts, fits, and asks for nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import needs_chromium
from tests.conftest import Finished

pytestmark = [
    pytest.mark.ray,
    pytest.mark.vllm,
    needs_chromium,
]

Open = Callable[..., Page]


@pytest.fixture
def open_report(browser: Browser, tiny_run: Finished) -> Iterator[Open]:
    """Opens the page and waits for its charts. At the end: no error, no warning, and no request but for the page itself."""
    pages: list[Page] = []
    said: list[str] = []
    asked: set[str] = set()

    def start(width: int = 1400, scheme: str = "light") -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on(
            "console",
            lambda message: said.append(message.text) if message.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.add(request.url.partition(":")[0]))
        page.goto((tiny_run.folder / "report.html").as_uri())
        expect(page.locator("body")).to_have_attribute("data-charts", "drawn")
        pages.append(page)
        return page

    yield start
    for page in pages:
        page.close()
    assert not said
    assert asked <= {"file", "data", "blob"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_page(open_report: Open, width: int, scheme: str) -> None:
    page = open_report(width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    charts = page.locator("[data-chart]").count()
    expect(page.locator("[data-chart] svg.marks")).to_have_count(charts)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = page.evaluate(
        "[...document.querySelectorAll('table, svg, pre, select, dd')].filter((one) => one.getBoundingClientRect().right"
        " > innerWidth + 1).map((one) => one.tagName + one.id)"
    )
    assert not wide
    assert charts > 8
    text = page.locator("#chart-gains-ndcg svg.marks text").first.evaluate(
        "(one) => getComputedStyle(one).fill"
    )
    assert (text == "rgb(230, 233, 238)") == (scheme == "dark")


def test_a_phone_shows_the_verdict_and_opens_what_is_asked_for(open_report: Open) -> None:
    page = open_report(400)
    assert page.evaluate("document.documentElement.scrollHeight") < 3000
    expect(page.locator("#verdict .claims")).to_be_visible()
    expect(page.locator("svg.marks")).to_have_count(0)
    page.get_by_role("link", name="Test users").click()
    expect(page.locator("#test svg.marks").first).to_be_visible()
    expect(page.locator("#rounds details").first).not_to_have_attribute("open", "")


def test_a_user_is_found_by_id_and_by_a_text(open_report: Open) -> None:
    page = open_report()
    users = json.loads(page.locator("#users-data").text_content() or "")
    wanted = users[-1]
    page.get_by_label("Search ids, titles and texts").fill(wanted["id"])
    article = page.locator("#user")
    expect(article.locator("h3")).to_have_text(f"User {wanted['id']}")
    sampled = wanted["rounds"][0]["texts"]
    table = article.get_by_role("table", name="Round 1")
    expect(table.locator("tbody tr")).to_have_count(len(sampled))
    rewards = [float(one) for one in table.locator("tbody td:nth-child(2)").all_text_contents()]
    assert rewards == sorted(rewards, reverse=True)
    expect(table).to_contain_text(sampled[0]["text"])
    expect(article).to_contain_text("Fresh texts after round 1")
    expect(article).to_contain_text("by the reward's reranker where the run has one")

    # The words of a title, wherever they stand in what is known of a user.
    page.get_by_label("Search ids, titles and texts").fill(wanted["history"][0][0])
    words = wanted["history"][0][0].lower().split()
    count = sum(all(word in values(user) for word in words) for user in users)
    assert count > 0
    expect(page.locator("#user-count")).to_have_text(f"{count} of {len(users)} users")
    page.get_by_label("Search ids, titles and texts").fill("nobody is called like this")
    expect(page.locator("#user-count")).to_have_text(f"0 of {len(users)} users")
    expect(article).to_have_text("No such user here")


def values(of: object) -> str:
    """All that a user's data says, without the names of its parts."""
    parts = of.values() if isinstance(of, dict) else of if isinstance(of, list) else None
    return str(of).lower() if parts is None else "\n".join(map(values, parts))


def test_a_table_sorts_by_number_and_by_name(open_report: Open) -> None:
    page = open_report()
    table = page.locator("#systems")
    heads = table.locator("thead th")
    head = heads.filter(has_text=re.compile("^NDCG@5$"))
    place = head.evaluate("(one) => one.cellIndex")

    def column(number: int) -> list[str]:
        return table.locator(f"tbody tr > :nth-child({number + 1})").all_text_contents()

    before = column(place)
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "ascending")
    values = [float(cell.split()[0]) for cell in column(place)]
    assert values == sorted(values) and column(place) != before
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "descending")
    assert [float(cell.split()[0]) for cell in column(place)] == values[::-1]
    heads.filter(has_text=re.compile("^system$")).get_by_role("button").click()
    assert column(0) == sorted(column(0))
    expect(head).to_have_attribute("aria-sort", "none")


def test_a_reader_of_the_screen_finds_landmarks_headings_and_names(open_report: Open) -> None:
    page = open_report()
    for role in ("banner", "main", "navigation", "contentinfo"):
        expect(page.get_by_role(role)).to_have_count(1)
    headings = page.get_by_role("heading", level=2).all_text_contents()
    assert headings[:3] == [
        "Verdict",
        "Why: from the texts to the test users, rung by rung",
        "One user at a time",
    ]
    for table in page.locator("table").all():
        assert table.locator("caption").text_content()
        assert table.locator("thead th[scope=col]").count()
    for figure in page.locator("figure").all():
        assert figure.locator("[role=graphics-document][aria-label]").count() == 1
    targets = page.locator("nav a").evaluate_all("(all) => all.map((one) => one.getAttribute('href'))")
    assert all(page.locator(target).count() == 1 for target in targets)
