"""metrics.jsonl: one line per step, and what a continued training keeps of it."""

from __future__ import annotations

from pathlib import Path

from dpo4rec_ray.store.metrics_file import MetricsFile, read_metrics


def test_steps_beyond_the_state_are_written_again(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path, rank=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": step / 10})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # the worker died here
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    again = MetricsFile(tmp_path, rank=0)
    again.go_on_after(2)
    again.write({"step": 3, "loss": 0.5})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.1, 0.2, 0.5]
    other = MetricsFile(tmp_path, rank=1)
    other.go_on_after(0)
    other.write({"step": 9})
    assert len(read_metrics(tmp_path)) == 3
