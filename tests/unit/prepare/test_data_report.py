from __future__ import annotations

from collections import Counter

import pytest

from dpo4rec_ray.config.data import FEW_BAD_ROWS
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare.data_report import DataReport
from dpo4rec_ray.prepare.ingest import FileCounts


@pytest.mark.parametrize(
    ("num_bad", "num_rows", "share", "stops"),
    [
        (FEW_BAD_ROWS, 480, 0.001, False), (FEW_BAD_ROWS + 1, 480, 0.001, True),  # a small file: by rows
        (100, 100_000, 0.001, False), (101, 100_000, 0.001, True),  # a large one: by share
        (0, 480, 0.0, False), (1, 480, 0.0, True),
        (480, 480, 1.0, False),
    ],
)  # fmt: skip
def test_damaged_rows_stop_a_run_by_their_share_and_never_a_handful(
    num_bad: int, num_rows: int, share: float, stops: bool
):
    line = {"path": "e.csv", "line": 7, "reason": "missing field rating", "text": "u,a,,100"}
    counts = FileCounts(
        rows_read=num_rows, quarantined=Counter({"missing field rating": num_bad, "empty line": 50})
    )
    counts.bad_lines = [line] if num_bad else []
    report = DataReport(["e.csv"], share, "table")
    if not stops:
        report.add("events", counts)
        assert report.counts["events"] is counts
        return
    with pytest.raises(
        UserError, match=rf"^e\.csv line 7: missing field rating: .*; {num_bad} of {num_rows} rows"
    ):
        report.add("events", counts)
