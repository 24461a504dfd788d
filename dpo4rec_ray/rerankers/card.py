"""The model card written beside every saved reranker: what it is, what it was trained on, how good it is.

Markdown for people; the same facts stand in reranker.json for programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SECTIONS = {
    "data": "Data and protocol",
    "settings": "Architecture",
    "fit": "Training",
    "figures": "Figures",
    "versions": "Versions",
}


def card_text(card: Mapping[str, Any]) -> str:
    """Markdown from the content of reranker.json; sections that are not known are left out.

    card: "settings", "knowledge" and "catalogue" as `save_reranker` writes them; "info" may hold "system", "seed",
    "data", "fit", "figures" and "versions" (JSON objects) and "commit".
    """
    info = card["info"]
    backbone, adapter = card["settings"]["backbone"], card["settings"]["adapter"]
    knowledge = f"with knowledge through the {adapter} adapter" if card["knowledge"] else "without knowledge"
    lines = [f"# Reranker {backbone}, {knowledge}", ""]
    if "system" in info:
        lines += [f"System `{info['system']}`, seed {info.get('seed', 0)}.", ""]
    lines += [
        "Scores the candidates of a list, seeing all of it. Load it with `dpo4rec_ray.rerankers.fit.load_reranker(folder, "
        "catalogue)`: weights are safetensors, settings JSON; nothing is unpickled. It fits the catalogue below and no "
        "other.",
        "",
    ]
    content = {
        **info,
        "settings": {**card["settings"], **{f"catalogue {k}": v for k, v in card["catalogue"].items()}},
    }
    for key, title in SECTIONS.items():
        if content.get(key):
            lines += [f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {_shown(value)} |" for name, value in content[key].items()]
            lines.append("")
    if info.get("commit"):
        lines += [f"Made by dpo4rec_ray at commit {info['commit']}.", ""]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return (
        f"{value:.4f}" if isinstance(value, float) and 0.001 <= abs(value) < 1000 else str(value)
    ).replace("|", "\\|")
