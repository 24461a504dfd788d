"""The benchmarks themselves take minutes to hours; here: their arguments, the harness, and the parts that are quick."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo4rec_ray.config import default_config
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.store.schemas import SCHEMAS
from tests.conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"
ECHO = "import json, sys; print('log'); print(json.dumps({'rate': float(sys.argv[1])}))"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    return harness


@pytest.mark.parametrize(
    "stage", ["prepare", "score", "generate", "dpo", "plan", "balance", "scaling", "serve"]
)
def test_every_benchmark_explains_its_arguments(
    stage: str, harness: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", stage, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / "bench.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "--folder" in capsys.readouterr().out
    assert {path.stem for path in BENCHMARKS.glob("*.py")} > {stage}


def test_programs_run_in_turn_and_the_median_is_kept(harness: Any) -> None:
    rates = {"a": iter("315"), "b": iter("246")}
    programs = {name: lambda own=own: harness.run("-c", ECHO, next(own)) for name, own in rates.items()}
    assert harness.in_turn(programs, 3, "rate") == [
        {"program": "a", "rate": 3.0, "rates": [3.0, 1.0, 5.0]},
        {"program": "b", "rate": 4.0, "rates": [2.0, 4.0, 6.0]},
    ]


def test_a_watched_program_gives_time_memory_and_its_last_line(harness: Any) -> None:
    seconds, peaks, answer = harness.watched(["-c", "import time; time.sleep(0.6);" + ECHO, "7"])
    assert answer == {"rate": 7.0}
    assert 0.6 <= seconds < 60
    assert 1 < peaks.driver_mib <= peaks.tree_mib and peaks.store_mib == 0
    with pytest.raises(SystemExit, match="ended with 3"):
        harness.watched(["-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match=r"broken\n.* ended with 1"):
        harness.run("-c", "raise SystemExit('broken')")


def test_parts_write_a_table_and_results(harness: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def part(bench: str) -> list[dict[str, Any]]:
        rows = [{"name": bench, "rate": 1234.5}, {"name": "other"}]
        harness.print_table(rows, "program {name} | rate, 1/s {rate:,.1f}")
        return rows

    harness.run_parts(tmp_path / "new", {"part": part}, "part", "own")
    lines = [line.replace(" ", "") for line in capsys.readouterr().out.strip().splitlines()]
    assert lines[0] == "|program|rate,1/s|"
    assert lines[2:4] == ["|own|1,234.5|", "|other||"]
    content = json.loads((tmp_path / "new/part.json").read_text())
    assert content["runs"] == [{"name": "own", "rate": 1234.5}, {"name": "other"}]
    assert content["machine"]["cpus"] > 0
    with pytest.raises(SystemExit, match=r"unknown part .prat.\. Known: part"):
        harness.run_parts(tmp_path, {"part": part}, "prat", "own")


def test_the_synthetic_users_of_generate(harness: Any, tmp_path: Path) -> None:
    answer = harness.run("benchmarks/generate_peers.py", "users", str(tmp_path), "--users", "50")
    assert answer == {"users": 50}
    users = RunDir(tmp_path).read("users")
    assert users["user_id"].to_pylist() == list(range(50))
    assert {len(history) for history in users["history_item_ids"].to_pylist()} == {8}


def test_the_profiled_actors_of_score(harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder as the stage makes it; the rerankers need a trained run."""
    import score

    encoded: list[dict[str, Any]] = []
    monkeypatch.setattr(score, "ShardScorer", lambda *_: encoded.append)
    store, config = RunDir(tmp_path), default_config()
    store.start("generations", 1)
    columns = [
        pa.array([value], field.type)
        for value, field in zip(
            (1, 7, 0, [1], [2], "likes books", "stop", None), SCHEMAS["generations"], strict=True
        )
    ]
    store.write("generations", pa.table(columns, schema=SCHEMAS["generations"]), 1)
    store.finish(Manifest("generations", "", 1), 1)
    assert score.profiled(config, store)["redraws"] == config.reward.num_redraws
    (row,) = encoded
    assert row["user_ids"].tolist() == [7] and row["vectors"].shape == (1, 384)


def test_the_pandas_peer_of_prepare(harness: Any, tmp_path: Path) -> None:
    """20 users with 12 of 20 items each, none below the core: 6 known events, the other 6 in two lists."""
    lines = [
        f"item{(user + place) % 20},user{user},{1 + place % 5}.0,{1000 + place}"
        for user in range(20)
        for place in range(12)
    ]
    (tmp_path / "Books.csv").write_text("\n".join(lines) + "\n")
    cores = ["--user-core", "12", "--item-core", "12"]
    answer = harness.run("benchmarks/prepare_pandas.py", str(tmp_path), str(tmp_path / "out"), *cores)
    counts = {name: answer[name] for name in ("rows", "users", "items", "events", "lists")}
    assert counts == {"rows": 240, "users": 20, "items": 20, "events": 240, "lists": 40}
