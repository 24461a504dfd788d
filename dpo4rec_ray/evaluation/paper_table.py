"""The paper's Table I, and a run's metrics laid out as the same rows.

Source of the values: arXiv 2410.05939, Table I, copied as printed. Some pairs of values appear twice there, in rows that
should differ (KAR_chatgpt-4o: DLCM and SetRank on ML-1M and Amazon-Books; PRM on Amazon-Beauty equals its backbone). They
are kept as they are.

A run's lists, split and protocol are not the paper's, so the levels do not compare. The table therefore gives every row's
difference to its own backbone, for the run's rows and for the paper's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dpo4rec_ray.evaluation.systems import BACKBONE, HEADLINE, Row

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

    dataset: `data.dataset` of the recipe; files: paths or URIs of its events and users. They show which release of
    MovieLens and which category of Amazon it is.
    """
    paths = list(files)
    # Only the release 1M has the file users.dat.
    if dataset == "movielens" and any("users.dat" in path for path in paths):
        return "ml-1m"
    if dataset == "amazon2018":
        for key, category in (("amazon-books", "Books"), ("amazon-beauty", "All_Beauty")):
            if any(re.search(rf"(^|/){category}(_5)?\.(json|csv)", path) for path in paths):
                return key
    return None


def layout(table: Sequence[Row], comparisons: Sequence[Row], paper: str | None = None) -> list[Row]:
    """The rows of Table I for a run, each backbone followed by the paper's rows for it.

    table, comparisons: of `evaluation.tables`; paper: a key of TABLE_I, None for none. A row has "backbone", "method",
    "source" ("run" or "paper") and, for each metric of HEADLINE, the metric, "<metric> sd" over seeds,
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
