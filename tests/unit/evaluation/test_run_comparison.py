"""Finished runs side by side: paired differences, what differs in their recipes, and which runs are refused."""

from __future__ import annotations

import html.parser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo4rec_ray.cli import compare as command
from dpo4rec_ray.cli import runs as runs_command
from dpo4rec_ray.config import load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.evaluation.run_comparison import (
    ComparedRun,
    check_same_lists,
    differences,
    recipe_differences,
)
from dpo4rec_ray.evaluation.tables import comparisons
from dpo4rec_ray.report.comparison import claims, tables, to_html, to_markdown
from dpo4rec_ray.store.artifacts import Manifest, RunDir, write_json
from tests.unit.evaluation.frames import DLCM, SIMPLE, frame, random_frame

CHANGE = {"before": 0.1, "after": 0.3, "change": 0.2, "change_ci95": [0.1, 0.3]}


def run_of(name: str, per_list: Any, *changes: str, lists: str = "same", rounds: int = 0) -> ComparedRun:
    one = {"round": 1, "choice": {"kept": True}, "figures": {"reward": CHANGE, "reading": CHANGE}}
    summary = {"commit": "abc", "total_seconds": 61.0, "best_round": rounds, "rounds": [one] * rounds}
    return ComparedRun(name, load_config("demo", list(changes)), summary, per_list, lists)


def test_differences_are_those_of_the_evaluation_itself() -> None:
    """One run's base LLM beside another's round: the same as the two systems of one run."""
    names = [
        ("prm", "base-llm", 0),
        ("prm", "base-llm", 1),
        ("prm", "dpo4rec-round1", 0),
        ("prm", "dpo4rec-round1", 1),
    ]
    whole = random_frame([*names, ("none", "upper-bound", 0)])
    expected = {row["metric"]: row for row in comparisons(whole, 2000) if row["system"] == "dpo4rec-round1"}
    first = whole[whole["system"] == "base-llm"]
    second = whole[whole["system"] == "dpo4rec-round1"].assign(system="base-llm")
    rows = [row for row in differences([run_of("a", first), run_of("b", second)]) if row["run"] == "b"]
    assert [row["metric"] for row in rows] == ["map_paper@5", "ndcg@5"]
    for row in rows:
        for name in ("delta", "ci95", "p_value", "by user delta", "by user ci95"):
            assert row[name] == pytest.approx(expected[row["metric"]][name], abs=1e-12)


def test_a_system_that_only_one_run_has_stands_alone() -> None:
    more = run_of("b", frame(SIMPLE | DLCM))
    fewer = run_of("a", frame(SIMPLE | {fit: values for fit, values in DLCM.items() if fit[1] == "backbone"}))
    rows = [row for row in differences([fewer, more]) if row["system"] == "base-llm"]
    assert {row["run"] for row in rows} == {"b"} and "delta" not in rows[0]


def test_recipes_differ_in_their_keys_and_not_in_their_place() -> None:
    runs = [
        run_of("a", None, "run.name=a"),
        run_of("b", None, "run.name=b", "policy.objective=grpo"),
        run_of("c", None, "run.root=elsewhere", "dpo.beta=0.3"),
    ]
    assert recipe_differences(runs) == {
        "policy.objective": ["dpo", "grpo", "dpo"],
        "dpo.beta": [0.1, 0.1, 0.3],
    }


def test_other_test_lists_are_refused() -> None:
    first, other = run_of("a", None), run_of("b", None, "run.seed=3", "dpo.beta=0.3", lists="other")
    check_same_lists([first, first])
    with pytest.raises(UserError, match=r"b: its test lists are not those of a \(run\.seed differ\)"):
        check_same_lists([first, other])


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_what_is_the_same_is_said_once_and_names_are_text() -> None:
    changed = {fit: [1.0, 1.0, 1.0, 0.0] if fit[1] == "base-llm" else values for fit, values in DLCM.items()}
    runs = [
        run_of("<b>", frame(SIMPLE | DLCM), rounds=1),
        run_of("other", frame(SIMPLE | changed), "dpo.beta=0.3"),
    ]
    found = {heading: rows for heading, _, rows in tables(runs)}
    test = found["Test users, on identical lists"]
    assert [row[3] for row in test if row[1] == "backbone"] == ["all", "all"]
    assert [row[3] for row in test if row[1] == "base-llm"] == ["<b>", "<b>", "other", "other"]
    assert len(found["Validation users' texts in each run's last round, by its own rerankers"]) == 1
    page = to_html(runs)
    assert "<b>" not in page and "&lt;b&gt;" in page
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert "| `dpo.beta` | 0.1" in to_markdown(runs)


def test_the_page_begins_with_which_run_is_better() -> None:
    names = [("prm", "backbone", 0), ("prm", "base-llm", 0), ("prm", "dpo4rec-round1", 0)]
    per_list = random_frame([*names, ("none", "upper-bound", 0)])
    lower = per_list.copy()
    mine = lower["system"] == "dpo4rec-round1"
    lower.loc[mine, ["map_paper@5", "ndcg@5"]] -= 1.0
    first, worse = run_of("a", per_list, rounds=1), run_of("b", lower, rounds=1)
    (said,) = claims([first, worse])
    assert said.startswith("b is worse than a: NDCG@5 of dpo4rec-round1 with PRM -1.0000 [-1.0000, -1.0000]")
    assert claims([worse, first])[0].startswith("a is better than b: ")
    assert claims([first, run_of("c", per_list, rounds=1)])[0].startswith(
        "c is not measurably better or worse than a"
    )
    without = run_of("d", lower)
    without.summary["commit"] = "other"
    assert claims([first, without]) == [
        "d (base-llm) and a (dpo4rec-round1) have no difference here.",
        "The runs are of different commits: not only their recipes may differ.",
    ]
    assert f"<li>{said}</li>" in to_html([first, worse]) and f"- {said}\n" in to_markdown([first, worse])


def finished(folder: Path, *changes: str, lists: str = "same") -> Path:
    store = RunDir(folder)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", load_config("demo", list(changes)).model_dump(mode="json"))
    store.start("per_list")
    per_list = frame(SIMPLE | DLCM)

    store.write("per_list", pa.Table.from_pandas(per_list, preserve_index=False))
    store.finish(Manifest("per_list", "", len(per_list), stats={"test_lists": lists}))
    rows = comparisons(per_list, 200)
    summary = {"total_seconds": 1.0, "best_round": 1, "rounds": [], "comparisons": rows}
    write_json(folder / "summary.json", summary)
    return folder


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (
        str(finished(tmp_path / "runs" / name, f"dpo.beta={beta}")) for name, beta in (("a", 0.1), ("b", 0.2))
    )
    page = tmp_path / "page.html"
    assert command.main([one, two, "--out", str(page)]) == 0 and "<h2" in page.read_text()
    capsys.readouterr()
    assert command.main([one, two]) == 0
    assert "| `dpo.beta` | 0.1 | 0.2 |" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "runs/c").mkdir()
    (tmp_path / "runs/c/config.json").write_text((tmp_path / "runs/a/config.json").read_text())
    (tmp_path / "runs/nothing").mkdir()
    assert runs_command.main([str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b", "c"]
    assert lines[0].startswith("a  Texts ") and " to DLCM (+0." in lines[0]
    assert lines[2] == "c  not finished: prepare(0) is next"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/a"], "two runs at least"),
        (["runs/a", "runs/b", "--out", "x.txt"], "end the name in .html or .md"),
        (["runs/a", "runs/b", "--out", "nowhere/x.md"], "no folder nowhere"),
        (["runs/a", "nowhere"], "nowhere: not a run folder"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    finished(tmp_path / "runs/a")
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs_command.main([str(tmp_path)]) == 2
    assert "holds no run folder" in capsys.readouterr().err
    assert runs_command.main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
