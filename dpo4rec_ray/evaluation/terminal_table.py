"""The evaluation's table and differences as text for a terminal."""

from __future__ import annotations

from typing import Any

from dpo4rec_ray.evaluation.systems import HEADLINE, PRINTED, Row, label
from dpo4rec_ray.evaluation.table_formats import interval, paired


def printed(summary: dict[str, Any]) -> str:
    """The table and the differences for a terminal, at most 110 characters wide. summary: of `tables.summarise`."""
    by_user = [f"{name} by user" for name in HEADLINE]
    heads = "".join(f"{name:>17}" for name in HEADLINE) + "".join(f"{name:>8}" for name in PRINTED[2:])
    lines = [f"{'backbone':<9}{'system':<16}{heads}{'by user: map, ndcg':>20}{'seeds':>6}"]
    for row in summary["systems"]:
        cells = "".join(f"{_with_sd(row, name):>17}" for name in HEADLINE)
        cells += "".join(f"{row[name]:>8.4f}" for name in PRINTED[2:])
        cells += f"{', '.join(f'{row[name]:.4f}' for name in by_user):>20}"
        lines.append(f"{_cut(label(row['backbone']), 9)}{_cut(row['system'], 16)}{cells}{row['seeds']:>6}")
    pairs = paired(summary["comparisons"])
    if pairs:
        heads = "".join(f"{name:<36}" for name in HEADLINE).rstrip()
        lines += [
            "",
            "Differences on identical lists, 95 % interval and p-value over users (sd over seeds: comparisons.csv):",
        ]
        lines.append(f"{'backbone':<9}{'system':<16}{'against':<13}{heads}")
    for rows in pairs:
        first = rows[HEADLINE[0]]
        names = _cut(label(first["backbone"]), 9) + _cut(first["system"], 16) + _cut(first["against"], 13)
        lines.append((names + "".join(f"{interval(rows[name]):<36}" for name in HEADLINE)).rstrip())
        by_user = "".join(f"{interval(rows[name], 'by user '):<36}" for name in HEADLINE).rstrip()
        lines.append(f"{'':<25}{'  by user':<13}{by_user}")
    return "\n".join(lines)


def _with_sd(row: Row, name: str) -> str:
    return f"{row[name]:.4f}" + ("" if row[f"{name} sd"] is None else f" ±{row[f'{name} sd']:.4f}")


def _cut(name: str, width: int) -> str:
    return f"{name if len(name) < width else name[: width - 2] + '…':<{width}}"
