from __future__ import annotations

import re
from typing import Any

from dpo4rec_ray.evaluation.systems import HEADLINE
from dpo4rec_ray.evaluation.terminal_table import printed
from tests.unit.evaluation.frames import only


def test_printed_fits_the_terminal(summary: dict[str, Any]) -> None:
    lines = printed(summary).splitlines()
    assert max(map(len, lines)) <= 110
    assert len(lines) == 1 + len(summary["systems"]) + 3 + 2 * 4 * (1 + 3 + 2)
    row = only(summary["systems"], backbone="dlcm", system="base-llm")
    line = next(line for line in lines if line.startswith("DLCM     base-llm  "))
    for name in (*HEADLINE, "map@5", "mrr@10", "hr@10", "ndcg@5 by user"):
        assert f"{row[name]:.4f}" in line
    assert line.endswith(" 2")
    assert any(re.match(r"DLCM +dpo4rec-round12 +base-llm +[+-]0\.\d{4} \[", line) for line in lines)
