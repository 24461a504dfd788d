"""What teaches an LLM to read: one run's texts and rewards, DPO with other settings, all judged by the same rerankers.

python benchmarks/bench.py ablation RUN, where RUN is the folder of a complete run of one round. Each cell is a run
beside RUN that begins with its artifacts, and in which the stages that its keys touch run again (`dpo4rec run`); a cell that is
complete is kept. Then the reward rerankers of RUN, and no cell's own, score every cell's texts of the held-out users.
`dpo4rec study ablation` asks which part of the method a gain is due to; this compares settings of single parts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import harness
import numpy as np
import tomli_w
from harness import Row

from dpo4rec_ray.config import Config, read_config
from dpo4rec_ray.core.intervals import Interval, paired_bootstrap
from dpo4rec_ray.evaluation.heldout_texts import Figures, change_of, with_derived
from dpo4rec_ray.stages.validate import open_measure, texts_after, texts_before
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.studies.variants import lend

# Reader x reward x pairs, one factor at a time. Keys replace those of RUN.
PLAIN = ("pair.rule=best_vs_worst", "pair.pairs_per_user=1", "pair.others_share=0")
CELLS: dict[str, tuple[str, ...]] = {
    "best-worst": PLAIN,
    "others": (*PLAIN, "pair.others_share=0.5"),
    "many": (*PLAIN, "pair.rule=top_vs_bottom", "pair.pairs_per_user=3"),
    "personal": (*PLAIN, "reward.personal=12"),
    "personal-others": (*PLAIN, "reward.personal=12", "pair.others_share=0.5"),
    "reader-llm": (*PLAIN, 'reward.reader=["llm"]', "reward.must_read=false"),
    "reader-both": (*PLAIN, 'reward.reader=["statistics", "llm"]', "reward.must_read=false"),
}
# The same samples and rewards by another learner.
LEARNERS: dict[str, tuple[str, ...]] = {
    "best-of-n": ("policy.objective=best_of_n",),
    "grpo": ("policy.objective=grpo",),
    "grpo-dr": ("policy.objective=grpo", "grpo.scale=none", "grpo.token_weights=constant"),
    # Several turns: as many texts, but each turn's by the newest policy.
    "dpo-turns": ("run.turns_per_round=4",),
    "grpo-turns": ("policy.objective=grpo", "run.turns_per_round=4"),
    "best-of-n-dpo": (
        'policy.objective=["best_of_n", "dpo"]',
        "run.turns_per_round=2",
        "policy.reference_policy=turn",
    ),
}
SHOWN = ("reward", "reading", "reading_ndcg", "others_reward", "others_ndcg", "ndcg", "fit_above")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN")
    parser.add_argument("--cells", default=",".join(CELLS), help=f"of {', '.join(CELLS | LEARNERS)}")
    parser.add_argument(
        "--cell", nargs="+", action="append", default=[], metavar="NAME KEY=VALUE", help="further cells"
    )


def run(options: argparse.Namespace, folder: Path) -> int:
    base = RunDir(options.run_folder)
    cells = {base.root.name: ()} | {
        name: (CELLS | LEARNERS)[name] for name in filter(None, options.cells.split(","))
    }
    cells |= {name: tuple(changes) for name, *changes in options.cell}
    config = read_config(base.root)
    stores = {name: made(base, config, name, changes) if changes else base for name, changes in cells.items()}
    measure = open_measure(config, base)
    sides = {"before": texts_before(config, base, 1)}
    sides |= {name: texts_after(store, turns_of(store)) for name, store in stores.items()}
    users, figures = measure.figures(sides)
    before = figures.pop("before")
    first = next(iter(figures))
    found: list[Row] = []
    for name, after in figures.items():
        changes = change_of(before, after)
        row = {"cell": name, "keys": cells[name], "users": len(users), **training(stores[name])}
        row |= {figure: shown(changes[figure].change) for figure in SHOWN}
        row |= {
            f"{figure}_level": round(changes[figure].after.mean, 4) for figure in (*SHOWN, "values", "words")
        }
        row["reading_against_first"] = shown(against(after, figures[first], users))
        found.append(harness.note(row))
    harness.print_table(
        found,
        "cell {cell} | rows {rows} | accuracy own {accuracy_own} | others {accuracy_other} | training s {seconds} | "
        "sampling s {sampling} | reward {reward} | reading gain {reading} | in NDCG@5 {reading_ndcg} | style {others_reward} | "
        "in NDCG@5 {others_ndcg} | "
        "NDCG@5 {ndcg} | values {values_level} | distinct {distinct} | truth {truth} | "
        "reading gain against the first {reading_against_first}",
    )
    harness.write_results(folder / f"ablation-{base.root.name}.json", found)
    return 0


def made(base: RunDir, config: Config, name: str, changes: tuple[str, ...]) -> RunDir:
    """The run of one cell, beside RUN."""
    folder = base.root.with_name(f"{base.root.name}-{name}")
    folder.mkdir(exist_ok=True)
    lend(base, RunDir(folder))
    recipe = folder.with_suffix(".toml")
    own = {"run": {**config.run.model_dump(mode="json"), "name": folder.name, "root": str(folder.parent)}}
    recipe.write_bytes(tomli_w.dumps(config.model_dump(mode="json") | own).encode())
    program = [sys.executable, "-m", "dpo4rec_ray", "run", str(recipe), *changes]
    subprocess.run(program, check=True, env=harness.environment())
    return RunDir(folder)


def turns_of(store: RunDir) -> int:
    """Turns of the one round: the number of its last policy."""
    return read_config(store.root).run.turns_per_round


def training(store: RunDir) -> Row:
    """What the training came to, and the variety and truth (where it is known, above chance) of what is written after it."""
    turns = range(1, turns_of(store) + 1)
    policies = [store.require("policy", turn) for turn in turns]
    policy, heldout = policies[-1], store.require("heldout", turns[-1]).stats
    accuracies = {name: policy.stats.get(f"heldout_{name}") for name in ("accuracy_own", "accuracy_other")}
    truth = {side: heldout.get(f"text_accuracy_{side}") for side in ("before", "after")}
    return {
        "rows": sum((one.stats.get("rows") or one.stats["pairs"])["train"] for one in policies),
        **{name: "" if one is None else f"{one:.3f}" for name, one in accuracies.items()},
        "seconds": round(sum(one.seconds for one in policies)),
        "sampling": round(
            sum(store.require(name, turn).seconds for turn in turns for name in ("generations", "scores"))
        ),
        "distinct": f"{heldout['distinct_texts_after']:.2f}",
        "truth": "" if truth["after"] is None else "{before:.3f}, {after:.3f}".format(**truth),
    }


def against(cell: Figures, first: Figures, users: np.ndarray) -> Interval:
    difference = with_derived(cell)["reading"] - with_derived(first)["reading"]
    return paired_bootstrap(difference, users)


def shown(interval: Interval) -> str:
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
