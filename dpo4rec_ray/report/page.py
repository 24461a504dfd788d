"""Writes summary.json and report.html of a finished run and prints its table, from the manifests and metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import tomli_w

from dpo4rec_ray.config import Config, default_config
from dpo4rec_ray.config.recipe import RunSection
from dpo4rec_ray.core.intervals import signed
from dpo4rec_ray.evaluation import terminal_table
from dpo4rec_ray.evaluation.ladder import ladder, printed
from dpo4rec_ray.evaluation.next_change import next_change
from dpo4rec_ray.evaluation.verdict import printed as printed_verdict
from dpo4rec_ray.evaluation.verdict import verdict
from dpo4rec_ray.prepare.data_report import NOT_TAKEN
from dpo4rec_ray.report import html
from dpo4rec_ray.report.measured import heldout_rewards, reward_spreads, training_steps
from dpo4rec_ray.report.spent import spent
from dpo4rec_ray.report.text_browser import browsed
from dpo4rec_ray.stages.evaluate import read_evaluation
from dpo4rec_ray.stages.validate import best_round
from dpo4rec_ray.storage.places import write_text
from dpo4rec_ray.store.artifacts import PATHS, RunDir, write_json
from dpo4rec_ray.store.memory import peak_rss_mb
from dpo4rec_ray.store.metrics_file import METRICS
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.store.versions import commit, machine, versions

# Files of a run that the page links to, where it has them.
LINKED = (
    "summary.json",
    "config.json",
    "driver.log",
    "data/report.json",
    *(
        f"eval/{name}"
        for name in ("table.csv", "comparisons.csv", "breakdown.csv", "table.md", "table.tex", "metrics.json")
    ),
    "reward/diagnosis.json",
)


def run(
    config: Config, store: RunDir, last_round: int, log: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """Write summary.json and report.html; print the table; return the summary."""
    run, best, evaluated = config.run, best_round(store, last_round), read_evaluation(store)
    # without a policy the only round ends with its pairs, because nothing is trained on them
    scored = last_round if config.has_policy else min(1, config.run.max_rounds)
    summary: dict[str, Any] = {
        "generator": config.llm.source,
        "simulated_texts": config.llm.source == "template",
        "trainer": f"deepspeed-zero{config.policy.zero_stage}" if last_round else "none",
        "run": config.run.name,
        "seed": config.run.seed,
        "stages": log,
        "stage_seconds": round(sum(stage["seconds"] for stage in log), 1),
        "prepare": store.require("lists").stats,
        "reward": _stats(store, "reward"),
        "rewards": {  # of each round's first turn, which scores all validation users
            str(run.round_of(turn)): stats
            for turn in range(1, scored + 1, run.turns_per_round)
            if (stats := _stats(store, "scores", turn))
        },
        "rounds": [
            _round(run, store, end, evaluated["comparisons"]) for end in run.round_ends(last_round) if end
        ],
        "best_round": run.round_of(best),
        "best_policy": best,
        **evaluated,
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "peak_rss_mb": round(max(peak_rss_mb(), *_earlier_peaks(store, last_round))),
        "total_seconds": round(seconds, 1),
    }
    if config.has_policy and config.llm.path == "bootstrap":
        summary["bootstrap"] = store.require("base_llm").stats
    left = summary["prepare"].get("filtered", {}).get(NOT_TAKEN, 0) > 0
    summary["next_change"] = next_change(verdict(summary).advised, config, users_left=left)
    write_json(store.root / "summary.json", summary)
    write_text(store.root / "report.html", _html(config, store, last_round, summary))
    _print(summary)
    say(f"report: {store.root / 'summary.json'}, {store.root / 'report.html'}")
    return summary


def _stats(store: RunDir, name: str, round_id: int = 0) -> dict[str, Any]:
    """An artifact's stats; empty when the run does not have it."""
    manifest = store.manifest(name, round_id)
    return manifest.stats if manifest is not None else {}


def _earlier_peaks(store: RunDir, last_round: int) -> list[float]:
    """Peaks of the processes that made the artifacts: parts of a run may come from several."""
    names = ("lists", "reward", "per_list", "generations", "scores", "policy", "knowledge", "heldout")
    manifests = [store.manifest(name, round_id) for round_id in range(last_round + 1) for name in names]
    return [manifest.peak_rss_mb for manifest in manifests if manifest is not None]


def _round(
    run: RunSection, store: RunDir, round_id: int, comparisons: list[dict[str, Any]]
) -> dict[str, Any]:
    """One round's numbers: counts, held-out figures, training, the diagnosis, and the ladder that says what they mean.

    round_id: the round's last turn. Counts are of all its turns; the diagnosis of rewards is of the first, which scores all
    validation users, that of the training of the last.
    """
    first = run.first_turn(round_id)
    turns = [_turn(store, turn) for turn in range(first, round_id + 1)]
    generated = [store.require("generations", turn) for turn in range(first, round_id + 1)]
    reward = store.require("reward", run.reward_of(first)).stats
    scores = store.require("scores", first).stats
    policy = store.require("policy", round_id).stats
    heldout = store.require("heldout", round_id).stats
    since_base = heldout.get("figures_since_base", heldout["figures"])
    texts = {
        key: value for key, value in heldout.items() if key.startswith(("text_", "distinct_", "opening_"))
    }
    diagnosis = {"shuffle_drop": reward["shuffle_drop"], **scores, **texts}
    if "text_accuracy_before" in heldout:  # absent where the truth is not known
        diagnosis["text_accuracy"] = heldout["text_accuracy_before"]
    return {
        "round": run.round_of(round_id),
        "policy": round_id,
        "users": sum(one.stats["users"] for one in generated),
        "samples": sum(one.rows for one in generated),
        "failed": _added(one.stats["failed_by_reason"] for one in generated),
        "generation": {
            **_added(
                {name: one.stats.get(name, 0) for name in ("tokens", "shortened", "clipped", "invalid_json")}
                for one in generated
            ),
            **generated[-1].stats["this_run"],
        },
        "pairs": sum(turn["pairs"] for turn in turns),
        "dropped": _added(turn["dropped"] for turn in turns),
        "turns": turns if len(turns) > 1 else [],
        **{key: value for key, value in heldout.items() if key.startswith("heldout_reward_")},
        "heldout_users": store.require("heldout", round_id).rows,
        "choice": {**heldout["choice"], "against": run.round_of(heldout["choice"]["against"])},
        "figures": heldout["figures"],
        "figures_since_base": since_base,
        "text_accuracy_by_facet": {
            side: heldout.get(f"accuracy_by_facet_{side}", {}) for side in ("before", "after")
        },
        "training": policy,
        "diagnosis": diagnosis,
        "ladder": ladder(
            run.round_of(round_id), reward, scores, policy, {**heldout, "figures": since_base}, comparisons
        ),
    }


def _turn(store: RunDir, turn: int) -> dict[str, Any]:
    """What one turn sampled and learned, and how the watched users fared until it began."""
    scores, policy = store.require("scores", turn).stats, store.require("policy", turn).stats
    # Pairs of an earlier training may lie there still.
    pairs = _stats(store, "pairs", turn) if policy.get("objective", "dpo") == "dpo" else {}
    return {
        "turn": turn,
        "objective": policy.get("objective", "dpo"),
        "users": store.require("generations", turn).stats["users"],
        "pairs": pairs.get("pairs", 0),
        "dropped": pairs.get("dropped", {}),
        **{name: scores.get(name) for name in ("mean_reward", "spread")},
        **{name: policy.get(name) for name in ("steps", "staleness", "kl_per_token", "engine_gap")},
        "watched": scores.get("watched", {}),
        "warnings": [*scores.get("warnings", []), *policy.get("warnings", [])],
    }


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sums by name; names that came to nothing stay."""
    found: Counter[str] = Counter()
    for one in counts:
        found.update(one)
    return dict(found)


def _print(summary: dict[str, Any]) -> None:
    print(f"\n{terminal_table.printed(summary)}\n")
    if summary["simulated_texts"]:
        print('texts are simulated (llm.source = "template"): no number here says anything about an LLM')
    for row in summary["rounds"]:
        change = signed(row["heldout_reward_delta"], row["heldout_reward_delta_ci95"])
        print(
            f"round {row['round']}: held-out reward {row['heldout_reward_before']:.4f} -> "
            f"{row['heldout_reward_after']:.4f} ({change}), "
            f"{row['pairs']} pairs of {row['users']} users; {'kept' if row['choice']['kept'] else 'not kept'}"
        )
        print("rung by rung, each needs those before it:")
        print(printed(row["ladder"]))
    print(f"verdict: {printed_verdict(verdict(summary), summary['next_change'])}")
    print(f"{summary['total_seconds']:.0f} s, peak memory of the process tree {summary['peak_rss_mb']} MB")


def _html(config: Config, store: RunDir, last_round: int, summary: dict[str, Any]) -> str:
    run, rounds = config.run, summary["rounds"]
    scored = {int(name): run.first_turn(int(name) * run.turns_per_round) for name in summary["rewards"]}
    trainings = [f"{PATHS['policy'].format(round=turn)}/{METRICS}" for turn in range(1, last_round + 1)]
    return html.render(
        summary,
        stages=spent(config, store, summary["stages"]),
        heldout=heldout_rewards(store, rounds),
        steps=training_steps(store, run, rounds),
        spreads=reward_spreads(store, scored),
        users=browsed(config, store, last_round),
        recipe=_recipe(config),
        links=[name for name in (*LINKED, *trainings) if (store.root / name).is_file()],
    )


def _recipe(config: Config) -> str:
    """The keys that are not at their defaults, as TOML."""
    defaults = default_config().model_dump(mode="json")
    changed = {
        section: {key: value for key, value in values.items() if value != defaults[section][key]}
        for section, values in config.model_dump(mode="json").items()
    }
    return tomli_w.dumps({section: values for section, values in changed.items() if values})
