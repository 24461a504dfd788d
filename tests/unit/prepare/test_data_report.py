from __future__ import annotations

from collections import Counter

import pytest

from dpo4rec_ray.config.data import FEW_BAD_ROWS
from dpo4rec_ray.datasets.source import DataFile
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare.data_report import DataReport
from dpo4rec_ray.prepare.ingest import FileCounts, summed


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


def test_one_damaged_file_of_many_stops_a_run():
    """Its share of all rows is small, and nearly all of its own rows are damaged."""
    blocks = [
        {
            "file": number, "order": number, "rows_read": rows, "num_lines": rows, "rows_kept": rows - bad, "spans_lines": False,
            "quarantined": {"bad number": bad}, "filtered": {}, "cleaned": {},
            "bad_lines": [{"row": 4, "reason": "bad number", "text": f"of {number}"}] if bad else [],
        }
        for number, rows, bad in ((0, 100_000, 3), (1, 50, 40), (2, 100_000, 0))
    ]  # fmt: skip
    files = tuple(DataFile(f"{name}.csv", header=True) for name in "abc")
    report = DataReport([], 0.001, "table")
    with pytest.raises(
        UserError, match=r"^b\.csv line 6: bad number: 'of 1'; 40 of 50 rows of this file cannot"
    ):
        report.add("events", summed(blocks, files))
    blocks[1]["quarantined"] = {"bad number": FEW_BAD_ROWS}
    report.add("events", summed(blocks, files))
    # A handful of each of many small files is a lot of all of them.
    for block in blocks:
        block |= {"rows_read": 20, "quarantined": {"bad number": FEW_BAD_ROWS}}
    with pytest.raises(UserError, match="; 30 of 60 rows of 3 files cannot be used"):
        report.add("events", summed(blocks, files))
