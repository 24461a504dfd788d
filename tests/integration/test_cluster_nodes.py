"""Placement on a Ray of three nodes with different resources (processes on this machine; their GPUs are only numbers)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from dpo4rec_ray.cli.cluster import check_joined, check_stages, report
from dpo4rec_ray.config import load_config
from dpo4rec_ray.config.placed import Placed
from dpo4rec_ray.datasets.source import USERS, DataFile, Parsed
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare.ingest import read_rows
from dpo4rec_ray.prepare.partition_tasks import in_order
from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers.needs import Groups, Needs
from dpo4rec_ray.workers.nodes import ask_each_node
from dpo4rec_ray.workers.shards import Pool, run_shards
from tests.conftest import ROOT

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A head with two CPUs, and two nodes with a CPU and one GPU of type A10G each, in zones a and b."""
    import ray
    import ray.data
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **store})
    for zone in ("a", "b"):
        made.add_node(
            num_cpus=1, num_gpus=1, resources={"accelerator_type:A10G": 1}, labels={"zone": zone}, **store
        )
    old = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = made.address
    env = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(address=made.address, log_to_driver=False, runtime_env=env)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()
    made.shutdown()
    os.environ["RAY_ADDRESS"] = old or ""


def worker() -> type:
    class Where:
        def __call__(self, row: dict) -> dict:
            import time

            import ray

            time.sleep(row["high"] / 10)
            context = ray.get_runtime_context()
            return {
                "shard": int(row["shard"]),
                "users": 1,
                "node": context.get_node_id(),
                "actor": context.get_actor_id(),
            }

    return Where


def zone_of(node_id: str) -> str:
    import ray

    return next(node["Labels"].get("zone", "") for node in ray.nodes() if node["NodeID"] == node_id)


def test_labels_and_accelerators_decide_where_actors_run(cluster: None) -> None:
    where = Placed(label_selector={"zone": "in(b, c)"}, accelerator_type="A10G")
    pool = Pool(worker(), {}, size=1, num_cpus=0.5, num_gpus=0.5, where=where)
    rows = list(run_shards([(shard, 0, 0) for shard in range(4)], [pool], Progress("test", 4, "users")))
    assert {zone_of(row["node"]) for row in rows} == {"b"}


def test_prepare_runs_where_its_section_says(cluster: None, tmp_path: Path) -> None:
    """Its tasks, and those that read files."""
    import ray

    def task(number: int) -> str:
        return ray.get_runtime_context().get_node_id()

    def parse(block: bytes) -> Parsed:
        return Parsed(pa.table({"raw_id": [task(0)], "profile": [""]}), 1)

    data = Placed(label_selector={"zone": "b"})
    found = in_order("test", task, [(number,) for number in range(6)], data)
    file = tmp_path / "users.csv"
    file.write_text("a line\n")
    table, _ = read_rows((DataFile(str(file), parse),), USERS, None, data)
    assert {zone_of(node) for node in [*found, *table["raw_id"].to_pylist()]} == {"b"}


def test_what_no_node_has_is_refused_at_once(cluster: None, tmp_path: Path) -> None:
    began = time.monotonic()
    pool = Pool(worker(), {}, size=1, num_cpus=1, num_gpus=2, what="engines", keys="generate.gpus_per_engine")
    with pytest.raises(
        UserError, match=r"no node can hold one of the engines \(1 CPU, 2 GPUs\): the nodes are "
    ):
        list(run_shards([(0, 0, 1)], [pool], Progress("test", 1, "users")))
    with pytest.raises(UserError, match=r"dpo: no node can hold one of the workers of dpo .*label zone = c"):
        check_stages(load_config("demo", ["policy.label_selector.zone=c"]), ["dpo"])
    assert time.monotonic() - began < 5


def test_a_pool_grows_while_shards_wait(cluster: None) -> None:
    pool = Pool(worker(), {}, size=2, num_cpus=0.1, num_gpus=1, min_size=1)
    rows = list(run_shards([(shard, 0, 5) for shard in range(40)], [pool], Progress("test", 40, "users")))
    assert sorted(row["shard"] for row in rows) == list(range(40))
    assert len({row["actor"] for row in rows}) == 2
    assert {zone_of(row["node"]) for row in rows} == {"a", "b"}


def test_a_pool_without_room_for_all_goes_on_with_those_that_fit(
    cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pools = [
        Pool(worker(), {}, size=5, num_cpus=0.1, num_gpus=1, what="engines"),
    ]
    rows = list(run_shards([(shard, 0, 1) for shard in range(8)], pools, Progress("test", 8, "users")))
    assert len(rows) == 8
    assert "room for 2 of 5 engines" in capsys.readouterr().out


def test_bundles_of_one_engine_on_two_nodes_are_given_back(cluster: None) -> None:
    import ray
    from ray.util.placement_group import placement_group_table

    pool = Pool(worker(), {}, size=1, num_cpus=0.5, num_gpus=2, over_nodes=True, where=Placed())
    assert len(list(run_shards([(0, 0, 0), (1, 0, 0)], [pool], Progress("test", 2, "users")))) == 2
    deadline = time.monotonic() + 30
    while any(group["state"] != "REMOVED" for group in placement_group_table().values()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    groups = Groups()
    place = groups.option(Needs(0.5, 2, num_bundles=2))
    assert place is not None
    made = place()["scheduling_strategy"].placement_group
    ray.get(made.ready(), timeout=60)
    (found,) = [one for one in placement_group_table().values() if one["state"] == "CREATED"]
    assert {zone_of(node) for node in found["bundles_to_node_id"].values()} == {"a", "b"}
    groups.close()


def test_nodes_answer_and_the_report_names_them(cluster: None, tmp_path: Path) -> None:
    assert list(ask_each_node(lambda number: number + 1, 1).values()) == [2], "three nodes at one address"
    check_joined(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    lines = list(
        report(load_config("demo", ["generate.gpus_per_engine=1", "generate.accelerator_type=A10G"]))
    )
    nodes = [line.partition(": ")[2] for line in lines if line.startswith("node ")]
    assert sum(line.startswith("1 CPU, 1 GPU") and "GPUs of type A10G" in line for line in nodes) == 2
    [tokens] = [line for line in lines if line.startswith("tokens: ")]
    # The nodes are children of this process, and an earlier test in it may have made a token of its own (session.own_token).
    asked_for = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    assert tokens.startswith("tokens: on every node" if asked_for else "tokens: not on ")
    assert "generate: engines: 1 x 0.5 CPUs, 1 GPU, GPUs of type A10G" in lines
