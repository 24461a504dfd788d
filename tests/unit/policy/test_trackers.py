"""Each tracker for real: TensorBoard's files are read back, MLflow's from its database, W&B's from its offline record."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.tracker_packages import MODULES
from dpo4rec_ray.policy.trackers import TRACKERS
from tests.tracker_records import shown, wandb_rows

pytestmark = pytest.mark.usefixtures("own_settings_only")

SETTINGS = {"loss": "sigmoid", "beta": 0.01, "deepspeed": "own.json"}
# Prints, logs steps argv[3] to argv[4] and then neither closes nor ends.
WORKER = f"""
import sys, time
from pathlib import Path
from dpo4rec_ray.policy.trackers import TRACKERS
name, folder, first, last = sys.argv[1:5]
tracker = TRACKERS[name](Path(folder), "run-01", {SETTINGS!r})
print("a user's words", flush=True)
for step in range(int(first), int(last) + 1):
    tracker.log(step, {{"loss": step / 8, "lr": 1e-5}})
print("logged", flush=True)
time.sleep(600)
"""


def killed_after(
    name: str, folder: Path, first: int, last: int, seen: Callable[[], bool] = lambda: True
) -> None:
    """A worker that logs these steps and is killed, as soon as they are `seen` outside."""
    # a Ray worker's command line looks like this
    secret = "--redis-password=hunter2"
    command = [sys.executable, "-c", WORKER, name, str(folder), str(first), str(last), secret]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "logged\n" for line in process.stdout)
        deadline = time.monotonic() + 30
        while not seen():
            assert time.monotonic() < deadline, "what was logged is not written"
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)


def write(name: str, folder: Path, first: int, last: int) -> None:
    """A worker that logs these steps and comes to its end; its losses are those of any other, plus 100."""
    tracker = TRACKERS[name](folder, "run-01", SETTINGS)
    for step in range(first, last + 1):
        tracker.log(step, {"loss": 100 + step / 8, "lr": 1e-5})
    tracker.close()


def test_tensorboard_after_a_kill_shows_every_step_once(tmp_path: Path) -> None:
    """Killed at step 6, continued from a checkpoint at step 3: steps 4 to 6 are those of the second worker."""
    killed_after("tensorboard", tmp_path, 1, 6, seen=lambda: len(shown(tmp_path).get("lr", [])) == 6)
    write("tensorboard", tmp_path, 4, 8)
    expected = [(step, step / 8) for step in (1, 2, 3)] + [(step, 100 + step / 8) for step in (4, 5, 6, 7, 8)]
    found = shown(tmp_path)
    assert found["loss"] == expected
    assert [step for step, _ in found["lr"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [step for step, _ in found["settings/text_summary"]] == [0]


def test_tensorboard_files_of_one_second_stay_apart_and_in_order(tmp_path: Path) -> None:
    for first in (1, 3, 5):
        write("tensorboard", tmp_path, first, first + 1)
    assert [step for step, _ in shown(tmp_path)["loss"]] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_reads_it_as_we_do(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    write("tensorboard", tmp_path, 1, 5)
    write("tensorboard", tmp_path, 3, 6)
    reader = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == shown(tmp_path)["loss"]
    text = reader.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text) == SETTINGS


def test_a_training_without_steps_leaves_no_events(tmp_path: Path) -> None:
    TRACKERS["tensorboard"](tmp_path, "run-01", SETTINGS).close()
    assert list(tmp_path.iterdir()) == []


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path) -> None:
    """Killed at step 6, continued from step 3: steps 4 to 6 stay those of the first worker, in one run with its settings."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    killed_after("mlflow", tmp_path, 1, 6)
    write("mlflow", tmp_path, 4, 8)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("dpo4rec-ray").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run-01"
    assert run.data.params == {"loss": "sigmoid", "beta": "0.01", "deepspeed": "own.json"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [
        *((step, step / 8) for step in range(1, 7)), *((step, 100 + step / 8) for step in (7, 8))
    ]  # fmt: skip


def test_mlflow_names_no_password_of_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:hunter2@127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"tracker mlflow: .*check MLFLOW_TRACKING_URI") as raised:
        TRACKERS["mlflow"](tmp_path, "run-01", SETTINGS)
    assert "hunter2" not in str(raised.value) + "".join(capfd.readouterr())
    assert "\n" not in str(raised.value)


def test_mlflow_run_taken_away_is_a_warning_and_later_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While it trains, somebody deletes the run: the training goes on. A training that is continued asks what to do."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    tracker = TRACKERS["mlflow"](tmp_path, "run-01", SETTINGS)
    tracker.log(1, {"loss": 0.5})
    run_id = json.loads((tmp_path / "mlflow.json").read_text())["run_id"]
    mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").delete_run(run_id)
    for step in (2, 3):
        tracker.log(step, {"loss": 0.5})
    tracker.close()
    (warning,) = [text.getMessage() for text in caplog.records if text.name == "dpo4rec_ray.policy.trackers"]
    assert warning.startswith("tracker mlflow: ")
    assert warning.endswith("nothing is sent from step 2 on")
    assert json.loads((tmp_path / "mlflow.json").read_text()) == {"run_id": run_id, "step": 1}
    with pytest.raises(UserError, match=f"remove .*mlflow.json to start another run than {run_id}"):
        TRACKERS["mlflow"](tmp_path, "run-01", SETTINGS)


def test_a_damaged_run_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    for text in ('{"run_id": "7", "st', "[]", '{"run_id": "7", "step": "many"}'):
        (tmp_path / "mlflow.json").write_text(text)
        with pytest.raises(UserError, match=r"mlflow.json: not a tracker's run"):
            TRACKERS["mlflow"](tmp_path, "run-01", SETTINGS)


def wandb_losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of all offline runs below the folder, in order."""
    rows = [row for row in wandb_rows(folder) if "loss" in row]
    return [(int(row["_step"]), float(row["loss"])) for row in rows]


def test_wandb_goes_on_in_the_same_run(tmp_path: Path) -> None:
    """Killed at step 6, continued from step 3, offline: `wandb sync` finds every step once, and nothing but figures."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    killed_after("wandb", tmp_path, 1, 6, seen=lambda: len(wandb_losses(tmp_path)) == 6)
    write("wandb", tmp_path, 4, 8)
    assert wandb_losses(tmp_path) == [
        *((step, step / 8) for step in range(1, 7)), *((step, 100 + step / 8) for step in (7, 8))
    ]  # fmt: skip
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    run_id = json.loads((tmp_path / "wandb.json").read_text())["run_id"]
    assert {file.name for file in files if file.suffix == ".wandb"} == {f"run-{run_id}.wandb"}
    content = b"".join(file.read_bytes() for file in files)
    assert b"sigmoid" in content
    assert b"hunter2" not in content
    assert b"user's words" not in content


def test_wandb_without_a_key_says_what_to_do(tmp_path: Path) -> None:
    """In a process of its own: W&B reads its environment once."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    away = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "NETRC": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, "wandb", str(tmp_path), "1", "1"],
        env={**os.environ, **away},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.match(r".*UserError: tracker wandb: .*; check WANDB_API_KEY and the network$", last), last


def test_wandb_asks_nobody_for_a_key(tmp_path: Path) -> None:
    """At a terminal W&B would wait for an answer, and the run with it."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    away = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "NETRC": str(tmp_path / "none")}
    terminal, ours = pty.openpty()
    command = [sys.executable, "-c", WORKER, "wandb", str(tmp_path), "1", "1"]
    env = {**os.environ, **away, "TERM": "xterm"}
    with subprocess.Popen(command, env=env, stdin=ours, stdout=ours, stderr=ours) as process:
        os.close(ours)
        try:
            assert process.wait(120) == 1
        finally:
            process.kill()
            os.close(terminal)


@pytest.mark.parametrize(("name", "module"), MODULES.items())
def test_a_missing_package_is_named(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]  # how Python marks a module as absent
    with pytest.raises(UserError, match=rf"{name} needs the package {module}, .*; pip install {module}, or"):
        TRACKERS[name](tmp_path, "run-01", SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_every_tracker_has_its_package() -> None:
    assert MODULES.keys() == TRACKERS.keys()
