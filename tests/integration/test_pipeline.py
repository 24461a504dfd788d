"""One real run of every stage, and what a second run of the same or of a changed recipe does."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dpo4rec_ray.config import load_config, read_config
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.policy.batch import collate
from dpo4rec_ray.policy.logps import CompletionLogps
from dpo4rec_ray.policy.model import load_model, read_policy
from dpo4rec_ray.rerankers.fit import load_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.stages.evaluate import fit_name
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.reading import read_catalogue, read_list_data, read_vectors
from tests.conftest import DEMO, TINY, Finished, run_job

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

STAGES = [
    "prepare",
    "encode",
    "references",
    "train_reward",
    "generate",
    "score",
    "pair",
    "dpo",
    "encode",
    "validate",
    "evaluate",
]


def rows(run: Finished, name: str, round_id: int = 0) -> list[dict]:
    return RunDir(run.folder).read(name, round_id).to_pylist()


def test_summary_holds_what_it_promises(tiny_run: Finished) -> None:
    summary = tiny_run.summary
    assert summary["generator"] == "vllm" and not summary["simulated_texts"]
    generation = summary["rounds"][0]["generation"]
    assert generation["tokens"] > 0 and generation["tokens_per_s"] > 0
    for engine in generation["engines"].values():
        assert 0 < engine["busy"] <= 1 and engine["start_s"] > 0 and engine["engine_tokens"] > 0
    assert summary["trainer"] == "deepspeed-zero2"
    assert [stage["stage"] for stage in summary["stages"]] == STAGES
    assert all(
        {"round", "seconds", "rows_in", "rows_out", "skipped"} <= stage.keys() for stage in summary["stages"]
    )
    assert not any(stage["skipped"] for stage in summary["stages"])
    (one,) = summary["rounds"]
    assert {"round", "users", "samples", "pairs", "dropped", "heldout_reward_before"} <= one.keys()
    assert {"heldout_reward_after", "heldout_reward_delta_ci95", "training", "diagnosis"} <= one.keys()
    assert {"first_loss", "last_loss", "accuracy"} <= one["training"].keys()
    assert {"text_accuracy", "shuffle_drop", "gap_in_sample", "gap_held_out", "gap_held_out_ci95"} <= one[
        "diagnosis"
    ].keys()
    names = [rung["name"] for rung in one["ladder"]]
    assert names[:2] == ["text accuracy", "fit to later likes"] and "reading gain" in names
    against = ("backbone", "base-llm", "random-texts", "statistics")
    assert sorted(names[-4:]) == [f"test users, PRM against {other}" for other in against]
    assert {"reward", "reading", "others_reward", "reading_ndcg", "fit_above"} <= one["figures"].keys()
    assert summary["best_round"] == int(one["choice"]["kept"])
    assert summary["peak_rss_mb"] > 500
    assert summary["total_seconds"] > 0
    assert {"ray", "torch", "deepspeed", "transformers", "peft"} <= summary["versions"].keys()
    systems = Counter(row["system"] for row in summary["evaluation"])
    assert systems == {
        "random": 1, "popularity": 1, "upper-bound": 1, "backbone": 2, "statistics": 2, "random-texts": 2,
        "base-llm": 2, "dpo4rec-round1": 2,
    }  # fmt: skip
    assert len({row["num_lists"] for row in summary["evaluation"]}) == 1, "every system on identical lists"
    best = next(row for row in summary["evaluation"] if row["system"] == "upper-bound")
    for row in summary["evaluation"]:
        assert 0 < row["ndcg@5"] <= best["ndcg@5"]
        assert {"map_paper@5", "map@5"} <= row.keys()


def test_the_first_dpo_loss_is_ln2(tiny_run: Finished) -> None:
    assert tiny_run.summary["rounds"][0]["training"]["first_loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_counted_texts_are_read_by_rerankers_and_compared_with(tiny_run: Finished) -> None:
    """One text per user beside the LLM's, the reward's rerankers trained on it, and what each kind of texts brings."""
    texts = rows(tiny_run, "references")
    assert {row["subject"] for row in texts} == {"statistics"}
    assert sorted(row["subject_id"] for row in texts) == [row["user_id"] for row in rows(tiny_run, "users")]
    reward = RunDir(tiny_run.folder).path("reward")
    for fold in (reward / f"fold-{number}" for number in range(load_config(DEMO).reward.num_folds)):
        for folder in (fold, fold / "without-knowledge"):
            assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "reranker.json"}
    stats = json.loads((reward / "diagnosis.json").read_text())
    assert stats["reader"] == ["statistics"] and set(stats["channel"]) == {"vllm", "statistics", "random"}
    assert {
        "shuffle_drop",
        "shuffle_drop_llm",
        "valid_ndcg@5",
        "valid_ndcg@5 without knowledge",
    } <= stats.keys()
    for kind in stats["channel"]:
        assert f"{kind} {stats['channel'][kind]['gain']:+.4f}" in tiny_run.stdout


def test_score_says_whether_the_reward_is_robust(tiny_run: Finished) -> None:
    """Ties, agreement and carry-over of every metric, from the same samples; the scores are the first metric's."""
    stats = tiny_run.summary["rewards"]["1"]
    assert set(stats["metrics"]) == {"log_likelihood", "ndcg@5", "map@5", "mrr@10", "ndcg@5 as drawn"}
    by_metric = rows(tiny_run, "metric_scores", 1)
    assert len(by_metric) == 5 * len(rows(tiny_run, "scores", 1))
    first = {
        (row["user_id"], row["sample_id"]): row["reward"]
        for row in by_metric
        if row["metric"] == "log_likelihood"
    }
    for row in rows(tiny_run, "scores", 1):
        assert first[row["user_id"], row["sample_id"]] == row["reward"]
        assert row["num_lists"] < 2 or row["std_error"] >= 0
    assert all(row["reward"] <= 0 for row in by_metric if row["metric"] == "log_likelihood")
    assert all(0 <= row["reward"] <= 1 for row in by_metric if row["metric"] != "log_likelihood")


def test_every_user_has_exactly_n_samples_or_a_reason(tiny_run: Finished) -> None:
    users = {row["user_id"]: row["split"] for row in rows(tiny_run, "users")}
    counts = Counter((row["user_id"], row["sample_id"]) for row in rows(tiny_run, "generations", 1))
    assert set(counts.values()) == {1}
    failed = RunDir(tiny_run.folder).failed("generations", 1)["subject_id"].to_pylist()
    sampled = {user for user, _ in counts}
    assert sampled | set(failed) == {user for user, split in users.items() if split != "test"}
    assert Counter(user for user, _ in counts) == dict.fromkeys(sampled, 3)


def test_samples_differ_and_their_token_ids_are_the_text(tiny_run: Finished) -> None:
    from dpo4rec_ray.policy.model import load_tokenizer

    samples = rows(tiny_run, "generations", 1)
    assert len({row["text"] for row in samples}) > len(samples) / 4
    tokenizer = load_tokenizer(
        json.loads((tiny_run.folder / "rounds/01/policy/policy.json").read_text())["base"]
    )
    for row in samples[:20]:
        assert tokenizer.decode(row["token_ids"], skip_special_tokens=True) == row["text"]
        assert row["prompt_token_ids"].count(tokenizer.bos_token_id) == 1
        assert (row["token_ids"][-1] == tokenizer.eos_token_id) == (row["finish_reason"] == "stop")


def test_test_users_are_read_by_evaluate_alone(tiny_run: Finished) -> None:
    test_users = {row["user_id"] for row in rows(tiny_run, "users") if row["split"] == "test"}
    assert test_users
    for name in ("generations", "scores", "pairs", "heldout"):
        assert not test_users & {row["user_id"] for row in rows(tiny_run, name, 1)}, name
    assert {row["user_id"] for row in rows(tiny_run, "per_list")} <= test_users


def test_no_prompt_history_reaches_into_a_list(tiny_run: Finished) -> None:
    """In the sample world a user meets an item once, so a prompt item in a list would be an event used twice."""
    history = {row["user_id"]: set(row["history_item_ids"]) for row in rows(tiny_run, "users")}
    for row in rows(tiny_run, "lists"):
        positives = {
            i for i, label in zip(row["candidate_item_ids"], row["labels"], strict=True) if label > 0
        }
        assert not positives & history[row["user_id"]]


def test_pairs_are_the_best_and_the_worst(tiny_run: Finished) -> None:
    rewards: dict[int, list[float]] = {}
    for row in rows(tiny_run, "scores", 1):
        rewards.setdefault(row["user_id"], []).append(row["reward"])
    pairs = rows(tiny_run, "pairs", 1)
    summary = tiny_run.summary["rounds"][0]
    assert sum(pair["split"] == "train" for pair in pairs) == summary["pairs"]
    train_users = sum(row["split"] == "train" for row in rows(tiny_run, "users"))
    assert summary["pairs"] + sum(summary["dropped"].values()) == train_users
    valid = {pair["user_id"] for pair in pairs if pair["split"] == "valid"}
    others = [pair for pair in pairs if pair["kind"] == "other"]
    assert len(others) == len(valid) and {pair["user_id"] for pair in others} == valid
    for pair in pairs:
        assert pair["chosen_reward"] == max(rewards[pair["user_id"]])
        if pair["kind"] == "other":
            assert pair["rejected_user_id"] in valid - {pair["user_id"]}
            continue
        assert pair["rejected_reward"] == [min(rewards[pair["user_id"]])]
        assert [pair["chosen_token_ids"]] != pair["rejected_token_ids"]


def test_the_saved_lora_and_the_merged_folder_are_the_same_policy(tiny_run: Finished) -> None:
    """What peft loads and what the next generator loads give equal log-probabilities, and both differ from the base."""
    from peft import PeftModel

    weights = read_policy(tiny_run.folder / "rounds/01/policy")
    pairs = rows(tiny_run, "pairs", 1)[:4]
    batch = collate([p["prompt_token_ids"] for p in pairs], [p["chosen_token_ids"] for p in pairs], 0)
    base = load_model(weights.base, "float32").eval()
    with torch.no_grad():
        before = CompletionLogps(base)(batch)
        merged = CompletionLogps(load_model(weights.merged, "float32").eval())(batch)
        adapted = CompletionLogps(PeftModel.from_pretrained(base, weights.lora).eval())(batch)
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=0)
    assert (adapted - before).abs().max() > 1e-4


def test_report_is_one_small_file_with_charts_users_and_the_recipe(tiny_run: Finished) -> None:
    """What a browser makes of it: tests/integration/test_report.py."""
    page = (tiny_run.folder / "report.html").read_text()
    assert len(page.encode()) < 3_000_000
    charts = set(re.findall(r'data-chart="(.*?)"', page))
    assert charts >= {
        "gains-ndcg",
        "across-rounds",
        "rewards-1",
        "spread",
        "step-accuracy",
        "step-kl_per_token",
        "seconds",
    }
    for system in ("popularity", "upper-bound", "dpo4rec-round1"):
        assert system in page
    (users,) = re.findall(r'id="users-data">(.*?)</script>', page)
    store = RunDir(tiny_run.folder)
    held_out = set(store.read("users", split="valid")["raw_id"].to_pylist())
    shown = json.loads(users)
    assert shown and {user["id"] for user in shown} <= held_out, "test users are read by the evaluation alone"
    assert any(text["mark"] == "chosen" for user in shown for text in user["rounds"][0]["texts"])
    assert all(user["prompt"] and user["rounds"][0]["after"] for user in shown)
    assert all(len(user["list"]["rankings"]) == 3 for user in shown if "list" in user)
    assert "verdict: Texts " in tiny_run.stdout


def test_the_terminal_is_quiet_and_shows_every_stage(tiny_run: Finished) -> None:
    for stage in STAGES:
        assert f"{stage}(" in tiny_run.stdout
    assert "dpo4rec-round1" in tiny_run.stdout
    own = [line for line in tiny_run.stderr.splitlines() if line.strip()]
    assert len(own) <= 2, own[:10]


def test_a_second_run_skips_everything_and_a_changed_key_redoes_only_what_follows(tiny_copy: Path) -> None:
    """Also: where the work is placed changes nothing, and a stage asked for by name makes what follows stale."""
    again = run_job(tiny_copy, DEMO, *TINY, "generate.num_engines=2", "reward.num_scorers=2")
    assert again.code == 0, again.stderr
    assert all(stage["skipped"] for stage in again.summary["stages"])
    assert again.summary["stage_seconds"] > 10
    foretold = run_job(tiny_copy, DEMO, *TINY, "evaluate.num_seeds=1", "--dry-run")
    assert foretold.code == 0, foretold.stderr
    *kept, evaluated, reported = foretold.stdout.splitlines()
    assert {line.split()[1] for line in kept} == {"kept"} and reported.startswith("report ")
    assert evaluated.split(None, 1)[1] == "would run: changed key evaluate.num_seeds (2 -> 1)"
    changed = run_job(tiny_copy, DEMO, *TINY, "evaluate.num_seeds=1")
    assert changed.code == 0, changed.stderr
    assert done_again(changed) == ["evaluate"]
    assert "evaluate(1): started, changed key evaluate.num_seeds (2 -> 1)" in changed.stdout
    only = run_job(tiny_copy, DEMO, *TINY, "--only", "pair", "--round", "1")
    assert only.code == 0, only.stderr
    assert "pair(1): started, forced by --only" in only.stdout
    assert "generate(1)" not in only.stdout
    after = run_job(tiny_copy, DEMO, *TINY)
    assert done_again(after) == ["dpo", "encode", "validate", "evaluate"]
    assert "dpo(1): started, changed input pairs/1" in after.stdout


def done_again(run: Finished) -> list[str]:
    return [stage["stage"] for stage in run.summary["stages"] if not stage["skipped"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "pairs"], "no such stage"),
        (["--only", "bootstrap"], "no such step in this recipe: --only bootstrap"),
        (["--from", "dpo", "--round", "7"], "no such step in this recipe: --from dpo --round 7"),
        (["--round", "1"], "--round needs"),
    ],
)
def test_a_selection_that_matches_nothing_is_refused(
    tiny_copy: Path, arguments: list[str], words: str
) -> None:
    done = run_job(tiny_copy, DEMO, *TINY, *arguments)
    assert done.code == 2
    assert words in done.stderr


def test_parts_are_complete_parquet_files(tiny_run: Finished) -> None:
    leftovers = [str(file) for file in tiny_run.folder.rglob("*.tmp*")]
    assert leftovers == []
    for file in Path(tiny_run.folder).rglob("part-*.parquet"):
        assert pq.ParquetFile(file).metadata.num_rows >= 0


@pytest.mark.slow
def test_two_rounds_with_lora_requests(tmp_path: Path) -> None:
    """vLLM loads each round's peft folder as a LoRA; round 2 starts from policy 1, not from the base LLM."""
    done = run_job(
        tmp_path, DEMO, *TINY, "llm.lora_mode=lora", "run.num_rounds=2", "run.patience=2", timeout=900
    )
    assert done.code == 0, done.stderr
    first, second = (read_policy(done.folder / f"rounds/{number:02d}/policy") for number in (1, 2))
    assert first.merged is None and second.merged is None
    assert second.base == str(done.folder / "rounds/02/policy/start")
    for one in done.summary["rounds"]:
        assert one["training"]["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
    pairs = rows(done, "pairs", 2)[:4]
    batch = collate([p["prompt_token_ids"] for p in pairs], [p["chosen_token_ids"] for p in pairs], 0)
    with torch.no_grad():
        base, start = (
            CompletionLogps(load_model(path, "float32").eval())(batch) for path in (first.base, second.base)
        )
    assert (start - base).abs().max() > 1e-4
    assert {row["system"] for row in done.summary["evaluation"]} >= {"dpo4rec-round1", "dpo4rec-round2"}


def test_test_users_are_measured_with_several_texts(tiny_run: Finished) -> None:
    """A list's metrics are the means over evaluate.num_texts texts of its user, ranked by the saved reranker."""
    store = RunDir(tiny_run.folder)
    config, catalogue = read_config(tiny_run.folder), read_catalogue(RunDir(tiny_run.folder))
    test = read_list_data(store, "test")
    name = fit_name(config, "prm", 1, 0)
    scorer = ListScorer([load_reranker(store.path("per_list") / "rerankers" / name, catalogue)], catalogue)
    users, rows = np.unique(test.user_rows.numpy(), return_inverse=True)
    found = []
    for sample_id in range(config.evaluate.num_texts):
        written, vectors = read_vectors(store, 1, "user", sample_id)
        own = vectors[np.searchsorted(written, users)]
        assert set(users) <= set(written)
        scores = scorer.score(test.item_ids, test.mask, own, rows, test.histories)
        found.append(list_metrics(scores, test.labels.numpy(), ["ndcg@5"], test.mask.numpy())["ndcg@5"])
    assert len(found) == 4 and any(not np.array_equal(found[0], one) for one in found)
    where = [("system", "=", "dpo4rec-round1"), ("seed", "=", 0), ("backbone", "=", "prm")]
    table = store.read("per_list", where=where, columns=["list_id", "ndcg@5"])
    lists = store.read("lists", split="test", columns=["split", "list_id"])["list_id"].to_pylist()
    measured = dict(zip(table["list_id"].to_pylist(), table["ndcg@5"].to_pylist(), strict=True))
    assert [measured[one] for one in lists] == pytest.approx(np.mean(found, axis=0), abs=1e-6)
