"""A run's table in the paper's layout, as Markdown and LaTeX."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

import pandas as pd

from dpo4rec_ray.evaluation.paper_table import layout
from dpo4rec_ray.evaluation.systems import HEADLINE, TITLES, Row, label


def to_markdown(table: Sequence[Row], comparisons: Sequence[Row], paper: str | None = None) -> str:
    """`paper_table.layout` as Markdown, what the numbers mean below it, and every difference with its interval."""
    rows = [
        [label(row["backbone"]), _method(row), *_cells(row, "±")] for row in layout(table, comparisons, paper)
    ]
    titles = [title for name in HEADLINE for title in (TITLES[name], f"Δ {TITLES[name]}")]
    pairs: list[list[str]] = []
    for by_metric in paired(comparisons):
        first = by_metric[HEADLINE[0]]
        names = [label(first["backbone"]), first["system"], first["against"]]
        pairs.append([*names, *(interval(by_metric[name]) for name in HEADLINE)])
    parts = [
        _markdown(rows, ["backbone", "method"], titles),
        _explained(table, paper),
        "Differences on identical lists:",
        _markdown(pairs, ["backbone", "system", "against"], [TITLES[name] for name in HEADLINE]),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(rows: list[list[str]], names: list[str], titles: list[str]) -> str:
    align = ["left"] * len(names) + ["right"] * len(titles)
    frame = pd.DataFrame(rows, columns=[*names, *titles])
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align)


def to_latex(table: Sequence[Row], comparisons: Sequence[Row], paper: str | None = None) -> str:
    """`paper_table.layout` as a tabular for LaTeX; needs the package booktabs."""
    titles = [title for name in HEADLINE for title in (TITLES[name], rf"$\Delta$ {TITLES[name]}")]
    rows: list[list[str]] = []
    rules: list[str] = []  # the rule above each row
    before = ("", "")
    for row in layout(table, comparisons, paper):
        block = (row["backbone"], row["source"])
        first = block[0] != before[0]
        rules.append(r"\midrule" if first else r"\cmidrule{2-6}" if block != before else "")
        name = escape(label(block[0])) if first else ""
        rows.append([name, escape(_method(row)), *map(_signs, _cells(row, r"$\pm$"))])
        before = block
    frame = pd.DataFrame(rows, columns=["Backbone", "Method", *titles])
    lines = frame.to_latex(index=False, column_format="llrrrr").splitlines()
    head, body, end = lines[:3], lines[4 : 4 + len(rows)], lines[4 + len(rows) :]
    ruled = [line for pair in zip(rules, body, strict=True) for line in pair if line]
    notes = [f"% {line}" for line in textwrap.wrap(_explained(table, paper), 108)]
    return "\n".join([r"% \usepackage{booktabs}", *notes, *head, *ruled, *end]) + "\n"


_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}  # fmt: skip


def escape(text: str) -> str:
    """Text with the characters that LaTeX reads as commands written out."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def paired(comparisons: Sequence[Row]) -> list[dict[str, Row]]:
    """Rows of `tables.comparisons` on HEADLINE, one entry per pair of systems: metric -> row."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in comparisons:
        if row["metric"] in HEADLINE:
            found.setdefault((row["backbone"], row["system"], row["against"]), {})[row["metric"]] = row
    return list(found.values())


def interval(row: Row, prefix: str = "") -> str:
    """A difference with its 95 % interval and p-value, e.g. "+0.0179 [+0.0100, +0.0250] p 0.001".

    prefix: "" for the mean over lists, "by user " for that over users.
    """
    delta, (low, high), p_value = (row[f"{prefix}{name}"] for name in ("delta", "ci95", "p_value"))
    if p_value is None:  # one user: nothing to resample
        return f"{delta:+z.4f}"
    return f"{delta:+z.4f} [{low:+z.4f}, {high:+z.4f}] {_p(p_value)}"


def _explained(table: Sequence[Row], paper: str | None) -> str:
    seeds = max(row["seeds"] for row in table)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so no deviation"
    text = (
        f"Means over {table[0]['lists']} lists; {spread}. MAP@5 is `map_paper@5`, the paper's. Δ: minus the backbone without "
        "knowledge; p: two-sided, paired bootstrap over users, not corrected for the number of comparisons. It says how "
        "much Δ changes with other users, not with other trainings: the deviation over seeds is in comparisons.csv."
    )
    if paper:
        text += (
            f" Rows marked (paper): arXiv 2410.05939, Table I, {paper}. The paper's protocol and lists differ from this "
            "run's: only the differences compare, not the levels."
        )
    return text


def _p(value: float) -> str:
    return f"p {value:.3f}" if value >= 0.0005 else "p <0.001"


def _method(row: Row) -> str:
    return row["method"] if row["source"] == "run" else f"{row['method']} (paper)"


def _cells(row: Row, plus_minus: str) -> list[str]:
    """Of each headline metric its mean with deviation, and its difference to the backbone with p-value."""
    places = 4 if row["source"] == "run" else 5  # as many as the paper prints
    cells: list[str] = []
    for name in HEADLINE:
        mean, sd, delta, p_value = (row[f"{name}{part}"] for part in ("", " sd", " delta", " p_value"))
        change = "" if delta is None else f"{delta:+z.{places}f}"
        cells.append(f"{mean:.{places}f}" if sd is None else f"{mean:.{places}f} {plus_minus} {sd:.4f}")
        cells.append(change if p_value is None else f"{change} ({_p(p_value)})")
    return cells


def _signs(cell: str) -> str:
    """A cell whose signs are set as minus and plus, not as hyphens, and whose `<` is not an inverted question mark."""
    return re.sub(r"^[+-][\d.]+", lambda found: f"${found[0]}$", cell).replace("<", "$<$")
