"""The page at `/` in headless Chromium, on a real service: it shows what the API answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from playwright.sync_api import Browser, Page, expect

from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.serving.http import build_api
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.service import Service
from dpo4rec_ray.serving.version_files import arrow_writer, table
from tests.browser import needs_chromium
from tests.serving_world import MAX_BODY, listening

pytestmark = needs_chromium

HOSTILE = '<img src=x onerror="window.hit = 1"><b>bold</b>'
Open = Callable[..., Page]


@contextmanager
def serving(service: Service, *tokens: str) -> Iterator[str]:
    """The application on a free port; its address."""
    with listening(build_api(service, frozenset(tokens), MAX_BODY)) as address:
        yield f"{address}/"


@pytest.fixture
def two_versions(registry: Registry) -> Registry:
    """v1 answers most users and v2 the others; v3 and mir are not loaded."""
    registry.split("v2", 30)
    return registry


@pytest.fixture
def url(two_versions: Registry) -> Iterator[str]:
    with serving(Service(two_versions)) as address:
        yield address


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens pages. At the end: no page has thrown, written an error to the console or sent a request to another host."""
    pages: list[Page] = []
    errors: list[str] = []
    hosts: set[str] = set()

    def log(kind: str, text: str) -> None:
        # Chromium's own line about an answer of 4xx or 5xx, or none: tests of such answers look at the page.
        if kind == "error" and not text.startswith("Failed to load resource"):
            errors.append(text)

    def start(address: str, width: int = 1280, scheme: str = "light") -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: log(message.type, message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
        page.goto(address)
        pages.append(page)
        return page

    yield start
    for page in pages:
        page.close()
    assert not errors
    assert hosts <= {"127.0.0.1"}


def answered(page: Page) -> None:
    """Wait for the answer to the newest question."""
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")


def cells(page: Page) -> list[list[str]]:
    """The table's rows below its head."""
    return [row.locator("td, th").all_text_contents() for row in page.locator("tbody tr").all()]


def ask(page: Page, url: str, **body: Any) -> dict[str, Any]:
    """The API's own answer."""
    return page.request.post(f"{url}v1/rerank", data={"return_documents": True, **body}).json()


def example(page: Page, url: str, place: int = 0) -> dict[str, Any]:
    """user_id and candidates of an example list."""
    one = page.request.get(f"{url}v1/examples").json()[place]
    return {"user_id": one["user_id"], "candidates": [item["item_id"] for item in one["candidates"]]}


def number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def way(before: int, now: int) -> str:
    """A cell: the place before, an arrow for eyes and words for screen readers."""
    if before == now:
        return f"{before + 1} =same place"
    sign, word = ("▲", "up") if before > now else ("▼", "down")
    return f"{before + 1} {sign}{abs(before - now)}{word} {abs(before - now)}"


def expected(answer: dict[str, Any], other: dict[str, Any] | None = None) -> list[list[str]]:
    """The rows of an answer, all of whose items are known."""
    rows = []
    for place, one in enumerate(answer["results"]):
        row = [str(place + 1), way(one["index"], place), one["document"]["text"] + one["item_id"]]
        row.append(number(one["relevance_score"]))
        if other:
            (before,) = [n for n, two in enumerate(other["results"]) if two["index"] == one["index"]]
            difference = one["relevance_score"] - other["results"][before]["relevance_score"]
            row += [way(before, place), "+" * (difference > 0) + number(difference)]
        rows.append(row)
    return rows


def test_the_first_example_is_ranked_and_its_user_shown(url: str, open_page: Open) -> None:
    page = open_page(url)
    answered(page)
    first = example(page, url)
    answer = ask(page, url, **first)
    assert cells(page) == expected(answer)
    assert any(one["index"] != place for place, one in enumerate(answer["results"]))  # else it shows little
    expect(page.get_by_label("User id")).to_have_value(first["user_id"])
    expect(page.get_by_label("Candidates, one item id per line")).to_have_value(
        "\n".join(first["candidates"])
    )

    known = page.request.get(f"{url}v1/users/{first['user_id']}/knowledge").json()
    assert known["text"]
    expect(page.locator("#text")).to_have_text(known["text"])
    expect(page.locator("#source")).to_have_text("stored")
    seen = [f"{one['title']}rated {one['rating']:g}" for one in reversed(known["history"])]
    assert page.locator("#history li").all_text_contents() == seen
    expect(page.locator("#length")).to_have_text(f"{len(seen)}, newest first")

    facts = dict(
        zip(page.locator("dt").all_text_contents(), page.locator("dd").all_text_contents(), strict=True)
    )
    assert float(facts.pop("Latency").removesuffix(" ms")) > 0
    source = f"stored ({answer['meta']['knowledge_version']})"
    assert facts == {"Answered by": answer["model"], "Knowledge": source, "Fallback": "no"}


def test_versions_are_switched_and_compared(url: str, open_page: Open) -> None:
    page = open_page(url)
    answered(page)
    first = example(page, url)
    versions = {name: ask(page, url, model=name, **first) for name in ("v1", "v2")}
    assert expected(versions["v1"]) != expected(versions["v2"])
    disabled = page.locator("#version option:disabled").all_text_contents()
    assert sorted(disabled) == ["mir, not loaded", "v3, not loaded"]

    page.get_by_label("Version").select_option("v2")
    answered(page)
    assert cells(page) == expected(versions["v2"])
    page.get_by_label("Compare with").select_option("v1")
    answered(page)
    assert cells(page) == expected(versions["v2"], versions["v1"])

    page.get_by_label("Compare with").select_option("without knowledge")
    answered(page)
    known = page.request.get(f"{url}v1/users/{first['user_id']}/knowledge").json()
    history = [{"item_id": one["item_id"], "rating": one["rating"]} for one in known["history"]]
    without = ask(page, url, model="v2", history=history, candidates=first["candidates"])
    assert cells(page) == expected(versions["v2"], without)
    assert [row[3] for row in expected(without)] != [row[3] for row in expected(versions["v2"])]


def test_a_version_promoted_meanwhile_can_be_chosen(two_versions: Registry, open_page: Open) -> None:
    service = Service(two_versions)
    with serving(service) as url:
        page = open_page(url)
        answered(page)
        two_versions.promote("v3")
        assert service.manager.refresh()
        page.get_by_role("button", name="Rerank").click()
        answered(page)
        expect(page.locator("#serving")).to_contain_text("v3 answers 70 %")
        page.get_by_label("Version").select_option("v3")
        answered(page)
        expect(page.locator("#status")).to_contain_text("v3 ranked")
        assert cells(page) == expected(ask(page, url, model="v3", **example(page, url)))


def test_a_list_of_ones_own(url: str, open_page: Open) -> None:
    page = open_page(url)
    answered(page)
    first = example(page, url)
    page.get_by_label("Compare with").select_option("v2")
    page.get_by_label("Candidates, one item").fill(f"nowhere\n\n  {first['candidates'][0]} \n")
    page.get_by_role("button", name="Rerank").click()
    answered(page)
    known, unknown = cells(page)
    assert known[1] == "2 ▲1up 1" and known[2].endswith(first["candidates"][0])
    assert unknown == ["2", "1 ▼1down 1", "nowhere", "unknown", "2 =same place", "–"]
    expect(page.get_by_role("cell", name="2 up 1", exact=True)).to_be_visible()  # without the arrow
    expect(page.get_by_label("Example list")).to_have_value("")  # no longer the example


def test_a_user_who_is_not_known(url: str, open_page: Open) -> None:
    page = open_page(url)
    answered(page)
    page.get_by_label("User id").fill("nobody")
    page.get_by_label("User id").press("Enter")
    answered(page)
    expect(page.locator("#text-about")).to_have_text("User nobody is not known.")
    expect(page.locator("#history")).to_be_hidden()
    expect(page.locator("dd").last).to_have_text("yes")  # a fallback
    candidates = example(page, url)["candidates"]
    assert cells(page) == expected(ask(page, url, user_id="nobody", candidates=candidates))


def test_keyboard_alone(url: str, open_page: Open) -> None:
    page = open_page(url)
    answered(page)
    reached = []
    while len(reached) < 30:
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "() => { const one = document.activeElement;"
            " return [one.id || one.textContent, getComputedStyle(one).outlineStyle]; }"
        )
        if name in reached or page.evaluate("document.activeElement === document.body"):
            break
        reached.append(name)
        assert outline == "solid", f"{name}: focus cannot be seen"
    fields = ["example", "back", "next", "user-id", "version", "other", "candidates", "Rerank"]
    assert reached == ["API", "Metrics", *fields, "ranking", "history"]

    users = page.request.get(f"{url}v1/examples").json()
    page.get_by_role("button", name="Next example").focus()
    for key, place in (("j", 1), ("j", 2), ("k", 1)):
        page.keyboard.press(key)
        answered(page)
        expect(page.get_by_label("Example list")).to_have_value(str(place))
        assert cells(page) == expected(ask(page, url, **example(page, url, place)))

    other = next(one["user_id"] for one in users if one["user_id"] != users[1]["user_id"])
    page.keyboard.press("/")
    expect(page.get_by_label("User id")).to_be_focused()
    page.keyboard.type(other)  # over the old one, which is selected
    page.keyboard.press("Enter")
    answered(page)
    expect(page.get_by_label("User id")).to_have_value(other)
    expect(page.locator("#text-about")).to_contain_text(f"About {other}")

    page.keyboard.type("jk/")  # keys of a field while one is focused
    expect(page.get_by_label("User id")).to_have_value(f"{other}jk/")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    expect(page.get_by_label("Example list")).to_have_value("0")

    page.get_by_label("Candidates, one item").fill("nowhere")
    page.keyboard.press("Control+Enter")
    answered(page)
    assert [row[2] for row in cells(page)] == ["nowhere"]


def test_only_the_newest_question_is_shown(url: str, open_page: Open) -> None:
    page = open_page(url)
    answered(page)
    page.route("**/v1/rerank", lambda route: None, times=1)  # the first of two answers does not come
    with page.expect_request("**/v1/rerank") as old:
        page.get_by_role("button", name="Next example").click()
    expect(page.locator("#status")).to_have_text("Ranking…")
    with page.expect_event("requestfailed", lambda request: request == old.value):  # called off
        page.get_by_role("button", name="Next example").click()
    answered(page)
    assert cells(page) == expected(ask(page, url, **example(page, url, 2)))
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window(two_versions: Registry, open_page: Open, scheme: str) -> None:
    for name in ("v1", "v2"):
        rewrite(two_versions.folder(name) / "items.arrow", "title", "Averylongtitlewithoutanyspace" * 5)
    with serving(Service(two_versions)) as url:
        page = open_page(url, width=400, scheme=scheme)
        answered(page)
        page.get_by_label("Compare with").select_option("v2")
        answered(page)
        assert "Averylong" in cells(page)[0][2]
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        expect(page.get_by_role("button", name="Rerank")).to_be_visible()
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(","))) / 3
        assert (brightness < 128) == (scheme == "dark")


def test_text_is_never_markup(two_versions: Registry, open_page: Open) -> None:
    folder = two_versions.folder("v1")
    rewrite(folder / "items.arrow", "title", HOSTILE)
    rewrite(folder / "texts.arrow", "text", HOSTILE)
    two_versions.split("v2", 0)
    with serving(Service(two_versions)) as url:
        page = open_page(url)
        answered(page)
        page.get_by_label("User id").fill(HOSTILE)
        page.get_by_label("User id").press("Enter")
        answered(page)
        expect(page.locator("#text-about")).to_have_text(f"User {HOSTILE} is not known.")
        page.get_by_role("button", name="Next example").click()
        answered(page)
        assert all(row[2].startswith(HOSTILE) for row in cells(page))
        assert all(line.startswith(HOSTILE) for line in page.locator("#history li").all_text_contents())
        expect(page.locator("#text")).to_have_text(HOSTILE)
        assert page.locator("main img, main b").count() == 0
        assert page.evaluate("window.hit") is None


def test_mistakes_are_one_line(url: str, open_page: Open) -> None:
    page = open_page(url)
    answered(page)
    page.get_by_label("User id").fill("nobody")
    page.get_by_label("Candidates, one item").fill("")
    page.get_by_role("button", name="Rerank").click()
    alert = page.get_by_role("alert")
    expect(alert).to_have_text("422: candidates: List should have at least 1 item after validation, not 0")
    expect(page.locator("#ranking")).to_be_hidden()  # nothing that answers another question
    expect(page.locator("#text-about")).to_have_text("User nobody is not known.")
    page.get_by_label("User id").fill("")
    page.get_by_label("Candidates, one item").fill("nowhere")
    page.get_by_role("button", name="Rerank").click()
    expect(alert).to_contain_text("422: Value error, give user_id or history")
    page.get_by_role("button", name="Next example").click()
    answered(page)
    expect(alert).to_be_hidden()
    expect(page.locator("#ranking")).to_be_visible()


def test_an_overloaded_service(two_versions: Registry, open_page: Open) -> None:
    with serving(Service(two_versions, ServingSection.model_construct(max_waiting=0))) as url:
        page = open_page(url)
        expect(page.get_by_role("alert")).to_have_text("503: too many requests wait; try again")


def test_a_service_that_has_gone(two_versions: Registry, open_page: Open) -> None:
    with serving(Service(two_versions)) as url:
        page = open_page(url)
        answered(page)
    page.get_by_role("button", name="Rerank").click()
    expect(page.get_by_role("alert")).to_contain_text("The service cannot be reached.")


def test_a_token_is_asked_for_and_not_kept(two_versions: Registry, open_page: Open) -> None:
    with serving(Service(two_versions), "the-token") as url:
        page = open_page(url)
        field = page.get_by_label("Token")
        expect(field).to_be_focused()
        assert field.get_attribute("type") == "password"
        page.keyboard.type("another")
        page.keyboard.press("Enter")
        expect(page.locator("#unlock-why")).to_contain_text("not accepted")
        field.fill("the-token")
        page.get_by_role("button", name="Continue").click()
        answered(page)
        expect(field).to_be_hidden()
        expect(field).to_have_value("")
        assert len(cells(page)) > 0
        kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
        assert kept == [0, 0, "", url]
        page.reload()
        expect(field).to_be_focused()


def rewrite(file: Path, column: str, value: str) -> None:
    """An Arrow file of a version with the same value in every row of a column."""
    found = table(file)
    values = pa.array([value] * len(found), pa.string())
    changed = found.set_column(found.schema.get_field_index(column), found.schema.field(column), values)
    with arrow_writer(file.with_suffix(".new"), found.schema) as writer:
        writer.write_table(changed)
    file.with_suffix(".new").replace(file)
