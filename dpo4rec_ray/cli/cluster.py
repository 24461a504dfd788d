"""What a job asks of the cluster it joins, in seconds and before anything is loaded: folder, nodes, and room for every stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dpo4rec_ray.cli.installed import check_nodes
from dpo4rec_ray.cli.mistakes import user_mistake
from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError, first_line
from dpo4rec_ray.storage.places import Place, is_remote
from dpo4rec_ray.workers.nodes import nodes_there
from dpo4rec_ray.workers.placement import check_room, joined_cluster
from dpo4rec_ray.workers.room import Workers, amounts, described
from dpo4rec_ray.workers.shared_folder import probe
from dpo4rec_ray.workers.stage_workers import engines, stage_workers

# Stages that start the engines, and those that are over by then.
START_ENGINES = ("encode", "generate")
BEFORE_ENGINES = ("prepare", "bootstrap")
# Below it Ray unpacks what `ray job submit --working-dir` sends; it is gone after the job.
JOB_FILES = "runtime_resources"
SHARED = (
    "set run.root to storage that every node sees, such as run.root=/shared/runs or run.root=s3://BUCKET/runs"
)
NO_TOKENS = "whoever reaches Ray's ports there can run code: start Ray with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on every node"


def check_lasting(folder: Place) -> None:
    """That a run folder is not among the files that came with a submitted job.

    Raises:
        UserError: it is.
    """
    if not joined_cluster() or is_remote(folder):
        return
    here, job = folder.resolve(), Path.cwd().resolve()
    if JOB_FILES in here.parts and here.is_relative_to(job):
        raise UserError(
            f"the run folder {here.relative_to(job)} would be in this job's own copy of the working directory, "
            f"which one node has and Ray removes; {SHARED}"
        )


def check_joined(folder: Place) -> None:
    """On a cluster: whether the nodes have the same code and libraries, and work in the same folder. Makes the folder.

    Raises:
        UserError: the first thing that is wrong.
    """
    if joined_cluster():
        check_lasting(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            check_nodes()
            check_shared(folder)
        except UserError:
            raise
        except Exception as error:  # of a worker that could not start, such as one without this package
            raise UserError(user_mistake(error) or f"a node does not answer: {first_line(error)}") from error


def check_shared(folder: Place) -> None:
    """That every node can work in the run folder.

    Raises:
        UserError: nodes that cannot, and why.
    """
    if blind := probe(folder):
        by_reason: dict[str, list[str]] = {}
        for node, why in sorted(blind.items()):
            by_reason.setdefault(why, []).append(node)
        said = ", and ".join(f"{', '.join(nodes)} {why}" for why, nodes in by_reason.items())
        raise UserError(f"the run folder {folder} is not one folder of all nodes: {said}; {SHARED}")


def check_stages(config: Config, stages: Sequence[str]) -> None:
    """Whether those of the stages that have workers of their own can be placed, beside engines that they keep.

    Raises:
        UserError: the first that can not, now or when the cluster has grown as far as it may.
    """
    for stage, workers in stage_workers(config).items():
        if stage not in stages:
            continue
        try:
            check_room(*workers)
        except UserError as error:
            raise UserError(f"{stage}: {error}") from None
        if kept := kept_beside(config, stage, stages):
            try:
                check_room(*kept, *workers)
            except UserError as error:
                advice = "or set generate.keep_engines=false, or lower generate.num_engines"
                raise UserError(f"{stage}: {error}; {advice}") from None


def kept_beside(config: Config, stage: str, stages: Sequence[str]) -> list[Workers]:
    """What holds its GPUs while `stage` works, without being of it: engines that one of `stages` has started and that stay.

    Kept engines on CPUs hold nothing between stages, as texts/engines.py starts them.
    """
    section = config.generate
    if not (section.keep_engines and config.has_policy and section.gpus_per_engine):
        return []
    if stage in (*BEFORE_ENGINES, *START_ENGINES) or not set(START_ENGINES) & set(stages):
        return []
    return [replace(engines(config), what="engines that generate.keep_engines leaves running")]


def report(config: Config) -> Iterator[str]:
    """What `--check` prints: nodes, tokens, and the workers of every stage.

    Raises:
        UserError: as `check_stages`.
    """
    there = nodes_there()
    for node in there:
        yield f"node {node.name}: {amounts(node.resources)}"
    if joined_cluster():
        nodes = check_nodes()
        yield f"code, libraries and run.root: the same on {len(nodes)} nodes"
        without = sorted(node for node, has in nodes.items() if not has.asks_for_tokens)
        yield f"tokens: not on {', '.join(without)}; {NO_TOKENS}" if without else "tokens: on every node"
    stages = stage_workers(config)
    check_stages(config, list(stages))
    for stage, workers in stages.items():
        kept = kept_beside(config, stage, list(stages))
        for group, fits in zip(workers, check_room(*kept, *workers)[len(kept) :], strict=True):
            room = "" if fits == group.count else f", room for {fits}"
            yield f"{stage}: {group.what}: {group.count} x {described(group.needs)}{room}"
