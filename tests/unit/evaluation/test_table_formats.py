from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dpo4rec_ray.evaluation.paper_table import layout
from dpo4rec_ray.evaluation.systems import HEADLINE
from dpo4rec_ray.evaluation.table_formats import escape, to_latex, to_markdown
from dpo4rec_ray.evaluation.tables import summarise, write_tables
from dpo4rec_ray.evaluation.terminal_table import printed
from tests.unit.evaluation.frames import ABOUT, DLCM, SIMPLE, frame, only


def markdown_rows(text: str) -> list[list[str]]:
    """The cells of a Markdown text's first table, without its head."""
    table = text.split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def level(cell: str) -> tuple[float, float | None]:
    mean, _, sd = cell.partition(" ± ")
    return float(mean), float(sd) if sd else None


def change(cell: str) -> tuple[float | None, float | None]:
    found = re.fullmatch(r"([+-][\d.]+)(?: \(p <?([\d.]+)\))?", cell)
    return (float(found[1]), float(found[2]) if found[2] else None) if found else (None, None)


def test_csv_markdown_and_latex_hold_the_same_values(summary: dict[str, Any], tmp_path: Path) -> None:
    """Each is read back and set against the layout; Markdown and LaTeX are rounded."""
    arguments = summary["systems"], summary["comparisons"], summary["paper"]
    lines = layout(*arguments)
    write_tables(tmp_path, summary)
    back = pd.read_csv(tmp_path / "table1.csv")
    pd.testing.assert_frame_equal(back, pd.DataFrame(lines), check_exact=True, check_dtype=False)

    rows = markdown_rows(to_markdown(*arguments))
    assert len(rows) == len(lines)
    for cells, line in zip(rows, lines, strict=True):
        assert cells[0] in ("", line["backbone"], line["backbone"].upper())
        assert cells[1] == line["method"] + (" (paper)" if line["source"] == "paper" else "")
        for name, shown in zip(HEADLINE, (cells[2:4], cells[4:6]), strict=True):
            places = 5e-6 if line["source"] == "paper" else 5.001e-5
            for got, key, room in (
                (level(shown[0])[0], name, places),
                (level(shown[0])[1], f"{name} sd", places),
                (change(shown[1])[0], f"{name} delta", places),
                (change(shown[1])[1], f"{name} p_value", 5.001e-4),
            ):
                assert got == (None if line[key] is None else pytest.approx(line[key], abs=room)), (key, line)

    tex = to_latex(*arguments)
    body = [line for line in tex.splitlines() if line.endswith(r"\\")][1:]
    shown = ""
    for text, cells in zip(body, rows, strict=True):
        plain = re.sub(r"\\([&%_])", r"\1", text.removesuffix(r" \\").replace(r"$\pm$", "±")).replace("$", "")
        found = [cell.strip() for cell in re.split(r" & ?", plain)]
        assert found[1:] == cells[1:]
        assert found[0] == (cells[0] if cells[0] != shown else "")  # once per block
        shown = cells[0]


def test_latex_is_a_plain_tabular(summary: dict[str, Any]) -> None:
    """Six columns in every row, groups and maths closed, no character left that LaTeX would read as a command."""
    lines = to_latex(summary["systems"], summary["comparisons"], summary["paper"]).splitlines()
    code = [line for line in lines if not line.startswith("%")]
    assert (code[0], code[1], code[-2], code[-1]) == (
        r"\begin{tabular}{llrrrr}", r"\toprule", r"\bottomrule", r"\end{tabular}"
    )  # fmt: skip
    rules = [line for line in code[2:-2] if line.startswith("\\")]
    assert rules == [r"\midrule"] * 2 + [r"\cmidrule{2-6}"] + [r"\midrule"] * 4
    for line in code[2:-2]:
        if line in rules:
            continue
        assert line.endswith(r" \\")
        assert len(re.findall(r"(?<!\\)&", line)) == 5
        assert line.count("$") % 2 == 0
        commands = re.sub(r"\\[&%#_{}]|\\pm|\\Delta|\\\\$", "", line)
        assert not re.search(r"[\\%#_{}~^]", commands), line
        assert line.isascii()
    assert any(line.startswith(r"own\_net\&1\% & backbone & ") for line in code)
    assert any("not the levels" in line for line in lines if line.startswith("%"))


def test_latex_escapes_everything_special() -> None:
    assert escape("a_b&c%d$e#f{g}") == r"a\_b\&c\%d\$e\#f\{g\}"
    assert escape("\\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"


def test_markdown_says_what_compares(summary: dict[str, Any]) -> None:
    arguments = summary["systems"], summary["comparisons"]
    beside = to_markdown(*arguments, "amazon-beauty")
    assert "arXiv 2410.05939, Table I, amazon-beauty" in beside
    assert "protocol and lists differ" in beside and "only the differences compare" in beside
    assert "over 2 seeds" in beside
    alone = to_markdown(*arguments)
    assert "2410.05939" not in alone and "(paper)" not in alone
    row = only(summary["comparisons"], backbone="mir", system="base-llm", against="backbone", metric="ndcg@5")
    line = next(
        line for line in beside.splitlines() if re.match(r"\| MIR +\| base-llm +\| backbone +\|", line)
    )
    found = [float(number) for number in re.findall(r"[+-]?\d\.\d+", line)][4:]
    assert found == pytest.approx([row["delta"], *row["ci95"], row["p_value"]], abs=5.001e-4)


def test_one_seed_and_one_user_are_shown_without_deviation_and_interval() -> None:
    fits = {fit: values for fit, values in (SIMPLE | DLCM).items() if fit[2] == 0}
    found = summarise(frame(fits, users=[1, 1, 1, 1]), ABOUT, 100)
    text = to_markdown(found["systems"], found["comparisons"])
    assert "one seed" in text and "±" not in text
    assert "| DLCM | base-llm | 0.1875 | +0.0312 | 0.3750 | +0.0625 |" in re.sub(" +", " ", text)
    assert "±" not in printed(found) and "nan" not in printed(found) + text


def test_no_difference_has_no_sign_of_one() -> None:
    """A difference of -.00001 rounds to +0.0000."""
    fits = SIMPLE | {("prm", "backbone", 0): [0.5] * 4, ("prm", "base-llm", 0): [0.49999] * 4}
    found = summarise(frame(fits), ABOUT, 100)
    assert "-0.0000" not in to_markdown(found["systems"], found["comparisons"]) + printed(found)


def test_markdown_without_anything_to_compare() -> None:
    """Heads of both tables, also where no pair of systems is compared."""
    found = summarise(frame(SIMPLE), ABOUT, 100)
    assert found["comparisons"] == []
    heads = [line for line in to_markdown(found["systems"], []).splitlines() if line.startswith("| backbone")]
    assert len(heads) == 2
