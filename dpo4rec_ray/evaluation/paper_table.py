"""The paper's Table I, and a run's figures in the same layout: Markdown, LaTeX and CSV.

Source of the values: arXiv 2410.05939, Table I, copied as printed. Some pairs stand there twice, in rows that should differ
(KAR_chatgpt-4o: DLCM and SetRank on ML-1M and Amazon-Books; PRM on Amazon-Beauty equals its backbone): they are kept.

A run's lists, split and protocol are not the paper's, so levels do not compare. The table therefore gives every row's
difference to its own backbone, for the run's rows and for the paper's.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

Row = dict[str, Any]

HEADLINE = ("map_paper@5", "ndcg@5")  # the paper's pair; its MAP is the one that counts only the hits found
TITLES = {"map_paper@5": "MAP@5", "ndcg@5": "NDCG@5"}  # as the paper heads its columns
BACKBONE, NO_BACKBONE = "backbone", "none"  # the system without knowledge; the backbone of what is not fitted
LABELS = {"dlcm": "DLCM", "prm": "PRM", "setrank": "SetRank", "mir": "MIR"}  # in the paper's order, then ours

DATASETS = ("ml-1m", "amazon-books", "amazon-beauty")
# Backbone, method, then MAP@5 and NDCG@5 on each of DATASETS.
_PRINTED = (
    ("dlcm", "backbone", 0.72815, 0.77053, 0.63823, 0.66078, 0.79069, 0.80959),
    ("dlcm", "KAR", 0.73482, 0.77622, 0.65794, 0.68434, 0.80909, 0.82667),
    ("dlcm", "KAR_chatgpt-4o", 0.73626, 0.77526, 0.66285, 0.69002, 0.80952, 0.82935),
    ("dlcm", "DPO4Rec_Yi-6B", 0.73809, 0.77822, 0.66345, 0.69042, 0.82496, 0.84082),
    ("dlcm", "DPO4Rec_Mistral-7B", 0.73666, 0.77840, 0.66386, 0.69098, 0.82388, 0.84222),
    ("dlcm", "DPO4Rec_Llama3.1-8B", 0.73952, 0.77942, 0.66563, 0.69310, 0.82734, 0.84488),
    ("prm", "backbone", 0.73471, 0.77558, 0.63808, 0.65896, 0.78759, 0.80977),
    ("prm", "KAR", 0.74082, 0.78171, 0.66707, 0.69481, 0.79646, 0.81408),
    ("prm", "KAR_chatgpt-4o", 0.74433, 0.78171, 0.66650, 0.69440, 0.78759, 0.80977),
    ("prm", "DPO4Rec_Yi-6B", 0.74283, 0.78329, 0.67223, 0.69967, 0.80620, 0.82344),
    ("prm", "DPO4Rec_Mistral-7B", 0.74280, 0.78323, 0.67321, 0.70127, 0.81089, 0.82594),
    ("prm", "DPO4Rec_Llama3.1-8B", 0.74542, 0.78529, 0.67397, 0.70174, 0.82035, 0.83517),
    ("setrank", "backbone", 0.72482, 0.76461, 0.65314, 0.67688, 0.74726, 0.77671),
    ("setrank", "KAR", 0.73776, 0.77828, 0.65598, 0.68317, 0.78903, 0.80977),
    ("setrank", "KAR_chatgpt-4o", 0.73626, 0.77526, 0.66285, 0.69002, 0.79170, 0.81175),
    ("setrank", "DPO4Rec_Yi-6B", 0.73972, 0.78087, 0.65685, 0.68291, 0.80108, 0.82187),
    ("setrank", "DPO4Rec_Mistral-7B", 0.74167, 0.78265, 0.65935, 0.68495, 0.79177, 0.81186),
    ("setrank", "DPO4Rec_Llama3.1-8B", 0.74352, 0.78430, 0.66061, 0.68686, 0.81385, 0.83151),
)
# dataset -> backbone -> method -> (MAP@5, NDCG@5)
TABLE_I: dict[str, dict[str, dict[str, tuple[float, float]]]] = {
    dataset: {
        backbone: {
            method: (values[2 * place], values[2 * place + 1])
            for name, method, *values in _PRINTED
            if name == backbone
        }
        for backbone in dict.fromkeys(name for name, *_ in _PRINTED)
    }
    for place, dataset in enumerate(DATASETS)
}


def key_of(dataset: str, files: Iterable[str]) -> str | None:
    """Which dataset of TABLE_I a run's data is, None where it is none of them.

    dataset: `data.dataset` of the recipe; files: paths or URIs of its events and users, which tell the releases of
    MovieLens and the categories of Amazon apart.
    """
    paths = list(files)
    if dataset == "movielens" and any(
        "users.dat" in path for path in paths
    ):  # of the releases, 1M alone has it
        return "ml-1m"
    if dataset == "amazon2018":
        for key, category in (("amazon-books", "Books"), ("amazon-beauty", "All_Beauty")):
            if any(re.search(rf"(^|/){category}(_5)?\.(json|csv)", path) for path in paths):
                return key
    return None


def layout(table: Sequence[Row], comparisons: Sequence[Row], paper: str | None = None) -> list[Row]:
    """The lines of Table I for a run, each backbone followed by the paper's rows for it.

    table, comparisons: of `dpo4rec_ray.evaluation`; paper: a key of TABLE_I, None for none. A line has "backbone",
    "method", "source" ("run" or "paper") and, for each metric of HEADLINE, the metric, "<metric> sd" over seeds,
    "<metric> delta" to the same source's backbone and "<metric> p_value"; None where there is none.

    Raises:
        KeyError: `paper` is no key of TABLE_I.
    """
    printed = TABLE_I[paper] if paper else {}
    deltas = {
        (row["backbone"], row["system"], row["metric"]): row
        for row in comparisons
        if row["against"] == BACKBONE
    }
    lines: list[Row] = []
    for place, row in enumerate(table):
        backbone = row["backbone"]
        line: Row = {"backbone": backbone, "method": row["system"], "source": "run"}
        for name in HEADLINE:
            delta = deltas.get((backbone, row["system"], name), {})
            line |= _cells(name, row[name], row[f"{name} sd"], delta.get("delta"), delta.get("p_value"))
        lines.append(line)
        if place + 1 == len(table) or table[place + 1]["backbone"] != backbone:
            lines += _paper_lines(backbone, printed.get(backbone, {}))
    return lines


def _paper_lines(backbone: str, methods: dict[str, tuple[float, float]]) -> list[Row]:
    lines: list[Row] = []
    for method, values in methods.items():
        line: Row = {"backbone": backbone, "method": method, "source": "paper"}
        for name, value, base in zip(HEADLINE, values, methods[BACKBONE], strict=True):
            delta = None if method == BACKBONE else round(value - base, 5)  # both are printed with 5 places
            line |= _cells(name, value, None, delta, None)
        lines.append(line)
    return lines


def _cells(name: str, mean: float, sd: float | None, delta: float | None, p_value: float | None) -> Row:
    return {name: mean, f"{name} sd": sd, f"{name} delta": delta, f"{name} p_value": p_value}


def to_csv(table: Sequence[Row], comparisons: Sequence[Row], paper: str | None = None) -> str:
    """`layout` as CSV, every figure in full; empty where there is none."""
    return pd.DataFrame(layout(table, comparisons, paper)).to_csv(index=False, lineterminator="\n")


def to_markdown(table: Sequence[Row], comparisons: Sequence[Row], paper: str | None = None) -> str:
    """`layout` as Markdown, what the figures mean below it, and every difference with its interval."""
    titles = [title for name in HEADLINE for title in (TITLES[name], f"Δ {TITLES[name]}")]
    lines = _markdown(["backbone", "method", *titles], 2)
    for row in layout(table, comparisons, paper):
        cells = [text for name in HEADLINE for text in (_level(row, name, "±"), _change(row, name))]
        lines.append(_line([label(row["backbone"]), _method(row), *cells]))
    lines += ["", _explained(table, paper), "", "Differences on identical lists:", ""]
    lines += _markdown(["backbone", "system", "against", *(TITLES[name] for name in HEADLINE)], 3)
    for rows in paired(comparisons):
        first = rows[HEADLINE[0]]
        cells = [interval(rows[name]) for name in HEADLINE]
        lines.append(_line([label(first["backbone"]), first["system"], first["against"], *cells]))
    return "\n".join(lines) + "\n"


def _explained(table: Sequence[Row], paper: str | None) -> str:
    seeds = max(row["seeds"] for row in table)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so no deviation"
    text = (
        f"Means over {table[0]['lists']} lists; {spread}. MAP@5 is `map_paper@5`, the paper's. Δ: minus the backbone without "
        "knowledge; p: two-sided, paired bootstrap over users, not corrected for the number of comparisons. It says how "
        "far other users would move the figure, not other trainings: the deviation over seeds is in comparisons.csv."
    )
    if paper:
        text += (
            f" Rows marked (paper): arXiv 2410.05939, Table I, {paper}. The paper's protocol and lists differ from this "
            "run's: only the differences compare, not the levels."
        )
    return text


def to_latex(table: Sequence[Row], comparisons: Sequence[Row], paper: str | None = None) -> str:
    """`layout` as a tabular for LaTeX; needs the package booktabs."""
    titles = [title for name in HEADLINE for title in (TITLES[name], f"$\\Delta$ {TITLES[name]}")]
    notes = [f"% {line}" for line in textwrap.wrap(_explained(table, paper), 108)]
    lines = ["% \\usepackage{booktabs}", *notes, "\\begin{tabular}{llrrrr}", "\\toprule"]
    lines.append(_tex_line(["Backbone", "Method", *titles]))
    before = ("", "")
    for row in layout(table, comparisons, paper):
        block = (row["backbone"], row["source"])
        if block != before:
            lines.append("\\midrule" if block[0] != before[0] else "\\cmidrule{2-6}")
        cells = [text for name in HEADLINE for text in (_level(row, name, "$\\pm$"), _change(row, name))]
        name = escape(label(block[0])) if block[0] != before[0] else ""
        lines.append(_tex_line([name, escape(_method(row)), *(_signs(cell) for cell in cells)]))
        before = block
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}  # fmt: skip


def escape(text: str) -> str:
    """Text with the characters that LaTeX reads as commands written out."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def label(backbone: str) -> str:
    """A backbone's name as papers write it; its own name where they do not, empty for none."""
    return "" if backbone == NO_BACKBONE else LABELS.get(backbone, backbone)


def paired(comparisons: Sequence[Row]) -> list[dict[str, Row]]:
    """Rows of `evaluation.comparisons` on HEADLINE, one entry per pair of systems: metric -> row."""
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


def _p(value: float) -> str:
    return f"p {value:.3f}" if value >= 0.0005 else "p <0.001"


def _method(row: Row) -> str:
    return row["method"] if row["source"] == "run" else f"{row['method']} (paper)"


def _places(row: Row) -> int:
    return 4 if row["source"] == "run" else 5  # as many as the paper prints


def _level(row: Row, name: str, sign: str) -> str:
    mean = f"{row[name]:.{_places(row)}f}"
    return mean if row[f"{name} sd"] is None else f"{mean} {sign} {row[f'{name} sd']:.4f}"


def _change(row: Row, name: str) -> str:
    delta, p_value = row[f"{name} delta"], row[f"{name} p_value"]
    if delta is None:
        return ""
    change = f"{delta:+z.{_places(row)}f}"
    return change if p_value is None else f"{change} ({_p(p_value)})"


def _markdown(titles: list[str], num_names: int) -> list[str]:
    rule = ["---"] * num_names + ["---:"] * (len(titles) - num_names)
    return [_line(titles), _line(rule)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _tex_line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _signs(cell: str) -> str:
    """A cell whose signs are minus and plus, not hyphens, and whose `<` is no Spanish question mark."""
    return re.sub(r"^[+-][\d.]+", lambda found: f"${found[0]}$", cell).replace("<", "$<$")
