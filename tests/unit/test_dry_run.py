"""What a run would do and why, from manifests as a run writes them: no stage runs, no Ray starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from dpo4rec_ray.cli.session import check_came_to
from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.pipeline import STAGES, before_rounds, how_far, rounds
from dpo4rec_ray.running import Runner, Selection, dry_run, is_finished
from dpo4rec_ray.store.artifacts import MANIFEST, RunDir, write_json
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.schemas import SCHEMA_VERSION

ALL = Selection()
STEPS = [
    "prepare(0)", "encode(0)", "references(0)", "train_reward(0)", "generate(1)", "score(1)", "pair(1)", "dpo(1)",
    "encode(1)", "validate(1)", "evaluate(1)",
]  # fmt: skip


def finish(config: Config, store: RunDir) -> None:
    """Write the manifests of all steps, as if they had run."""
    runner = Runner(config, store, Selection())
    steps = [(name, 0) for name in before_rounds(config)]
    steps += [(name, number) for number, names in rounds(config).items() for name in names]
    for name, number in [*steps, ("evaluate", config.run.num_turns)]:
        choice = {"kept": number == config.run.turns_per_round, "reward_ci95": [0.1, 0.2]}
        validated = {"best_round": config.run.turns_per_round, "choice": choice}
        stats = validated if name == "validate" else {}
        for artifact, place in STAGES[name].writes(number):
            depends = runner.depends(STAGES[name], number)
            store.start(artifact, place)
            store.finish(Outcome(1, 1, stats).manifest(artifact, depends, 0.0, config.run.seed), place)


@pytest.fixture
def store(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "run")
    finish(load_config("demo"), found)
    return found


def said(
    store: RunDir, capsys: pytest.CaptureFixture[str], *changes: str, selection: Selection = ALL
) -> dict[str, str]:
    """Step -> what is said about it, in order."""
    capsys.readouterr()
    dry_run(load_config("demo", list(changes)), store, selection)
    return {line.split()[0]: line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines()}


def test_nothing_is_there_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(RunDir(tmp_path / "run"), capsys)
    assert list(found) == [*STEPS, "report"]
    assert found["prepare(0)"] == "would run: not there yet"
    assert found["score(1)"] == "would run: after generate(1)"
    assert list(tmp_path.iterdir()) == []


def test_a_complete_run_is_kept_and_left_as_it_is(store: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in store.root.rglob("*")}
    found = said(store, capsys)
    assert [found[step] for step in STEPS] == ["kept"] * len(STEPS)
    assert {file: file.stat().st_mtime_ns for file in store.root.rglob("*")} == before


def test_a_changed_key_is_named_with_both_values(store: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(store, capsys, "reward.metric=ndcg@5")
    reason = 'would run: changed key reward.metric ("log_likelihood" -> "ndcg@5")'
    assert found["score(1)"] == reason
    assert found["pair(1)"] == "would run: after score(1)"
    assert found["encode(1)"] == "would run: after dpo(1)"
    kept = {step for step, text in found.items() if text == "kept"}
    assert kept == {"prepare(0)", "encode(0)", "references(0)", "train_reward(0)", "generate(1)"}


@pytest.mark.parametrize(
    ("changes", "step", "reason"),
    [
        (["run.seed=3"], "prepare(0)", "changed key run.seed (0 -> 3)"),
        (
            ["policy.lr=1e-3", "dpo.beta=0.2"],
            "dpo(1)",
            "changed key policy.lr (0.0005 -> 0.001), changed key dpo.beta (0.1 -> 0.2)",
        ),
        (["evaluate.num_seeds=1"], "evaluate(1)", "changed key evaluate.num_seeds (3 -> 1)"),
        (["generate.engine_args.seed=1"], "encode(0)", 'changed key generate.engine_args ({} -> {"seed": 1})'),
    ],
)  # fmt: skip
def test_every_kind_of_value(
    store: RunDir, capsys: pytest.CaptureFixture[str], changes: list[str], step: str, reason: str
) -> None:
    assert said(store, capsys, *changes)[step] == f"would run: {reason}"


def test_where_the_work_runs_changes_nothing(store: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(
        store, capsys, "generate.num_engines=1", "encoder.num_workers=2", "policy.checkpoint_every=7"
    )
    assert {found[step] for step in STEPS} == {"kept"}


def edit(store: RunDir, artifact: str, number: int, **changes: object) -> None:
    file = store.path(artifact, number) / MANIFEST
    write_json(file, json.loads(file.read_text()) | changes)


def test_rounds_end_where_the_second_was_not_better(
    store: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """`finish` calls round 1 the best in every round."""
    config = load_config("demo", ["run.num_rounds=auto"])
    finish(config, store)
    found = said(store, capsys, "run.num_rounds=auto")
    assert [step for step in found if step.startswith("validate")] == ["validate(1)", "validate(2)"]
    assert {text for step, text in found.items() if step not in ("report", "evaluate(2)")} == {
        "kept",
        "round 2: no longer better than the best round so far; no further round",
    }


def test_a_reward_that_is_trained_again_is_that_of_the_next_round(
    store: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["run.num_rounds=2", "run.retrain_reward=true", 'reward.reader=["llm"]']
    finish(load_config("demo", changes), store)
    found = said(store, capsys, *changes)
    second = list(found)[list(found).index("validate(1)") + 1 :]
    assert second[:3] == ["train_reward(2)", "generate(2)", "score(2)"]
    edit(store, "reward", 2, produced="anew")
    found = said(store, capsys, *changes)
    assert found["score(1)"] == "kept" and found["score(2)"] == "would run: changed input reward/2"
    edit(store, "knowledge", 1, produced="anew")
    assert said(store, capsys, *changes)["train_reward(2)"] == "would run: changed input knowledge/1"


def test_an_input_that_was_made_again_is_named(store: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    edit(store, "reward", 0, produced="anew")
    found = said(store, capsys)
    assert found["train_reward(0)"] == "kept"
    assert found["score(1)"] == "would run: changed input reward/0"


def test_what_lies_outside_the_run_is_named(store: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    made = store.require("knowledge", 0)
    edit(store, "knowledge", 0, fingerprint="", outside=made.outside | {"text encoder": "another"})
    for name in ("users", "items", "truth", "lists"):
        edit(store, name, 0, fingerprint="", outside={"raw files": "others"})
    found = said(store, capsys)
    assert found["prepare(0)"] == "would run: raw files changed"
    edit(store, "lists", 0, fingerprint=made.fingerprint)
    found = said(store, capsys, selection=Selection(only="encode", round_id=0))
    assert found["encode(0)"] == "would run: forced by --only"


def test_the_encoder_is_named(store: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    edit(
        store,
        "knowledge",
        0,
        fingerprint="",
        outside={"text encoder": "another", "wording of the prompts": "old"},
    )
    assert (
        said(store, capsys)["encode(0)"] == "would run: text encoder changed, wording of the prompts changed"
    )


def test_an_old_manifest_says_that_it_does_not_know(
    store: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """Manifests of older versions hold neither settings nor what lies outside; where nothing changed they are kept."""
    for name in ("scores", "metric_scores"):
        edit(store, name, 1, settings={}, outside={})
    assert said(store, capsys)["score(1)"] == "kept"
    found = said(store, capsys, "reward.metric=ndcg@5")
    assert found["score(1)"] == "would run: recipe or input changed"


def test_an_older_format_is_named(store: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    edit(store, "pairs", 1, fingerprint="of another format", schema_version=SCHEMA_VERSION - 1)
    assert said(store, capsys)["pair(1)"] == "would run: format of the artifacts changed"


def test_pairs_of_the_first_round_are_the_same_with_and_without_those_of_earlier_ones(
    store: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    found = said(store, capsys, "run.keep_pairs=true")
    assert {found[step] for step in STEPS} == {"kept"}


def test_data_may_move(store: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """What the files hold is known by their content."""
    assert said(store, capsys, "data.raw_dir=elsewhere")["prepare(0)"] == "kept"
    settings = store.require("lists").settings
    for name in ("users", "items", "truth", "lists"):  # as a version wrote it to which the folder mattered
        older = settings | {"data": settings["data"] | {"raw_dir": "once"}}
        edit(store, name, 0, fingerprint="of an older version", settings=older)
    assert said(store, capsys)["prepare(0)"] == "kept"


def test_a_key_of_the_texts_own_section_is_named(store: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["llm.source=openai", "openai.model=one", "openai.base_url=http://localhost/v1", "run.num_rounds=0"]
    finish(load_config("demo", own), store)
    assert said(store, capsys, *own)["encode(0)"] == "kept"
    reason = 'changed key openai.model ("one" -> "two")'
    assert said(store, capsys, *own, "openai.model=two")["encode(0)"].endswith(reason)


def test_what_a_version_made_that_did_not_know_a_key_is_kept(
    store: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """The key counts as its default there, so another value than that is a change, and a key that is gone is one."""
    made = store.require("generations", 1)
    older = {**made.settings, "generate": {**made.settings["generate"]}}
    del older["generate"]["min_p"], older["run.watched_users"]
    edit(store, "generations", 1, fingerprint="of an older version", settings=older)
    assert said(store, capsys)["generate(1)"] == "kept"
    found = said(store, capsys, "generate.min_p=0.1", "run.watched_users=0.5")["generate(1)"]
    assert found == (
        "would run: changed key generate.min_p (0.0 -> 0.1), changed key run.watched_users (0.25 -> 0.5)"
    )
    edit(store, "generations", 1, settings=older | {"generate.retired": 3})
    assert said(store, capsys)["generate(1)"] == "would run: changed key generate.retired (3 -> not there)"


def test_a_removed_artifact_is_not_there(store: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    (store.path("metric_scores", 1) / MANIFEST).unlink()
    assert said(store, capsys)["score(1)"] == "would run: not there yet"


def test_selections(store: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(store, capsys, selection=Selection(only="pair"))
    assert found.pop("pair(1)") == "would run: forced by --only"
    assert set(found.values()) == {"not selected"} and "report" not in found
    found = said(store, capsys, selection=Selection(since="dpo"))
    assert found["pair(1)"] == "not selected"
    assert found["dpo(1)"] == "would run: forced by --from"
    assert found["evaluate(1)"] == "would run: after encode(1)"
    assert found["report"].startswith("would run")


def test_a_selection_without_its_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"stage score: .*generations is missing or incomplete; run the stage generate first"
    ):
        dry_run(load_config("demo"), RunDir(tmp_path / "run"), Selection(only="score"))
    assert list(tmp_path.iterdir()) == []


def test_rounds_end_where_the_run_would_end_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second round brought less: a third one follows only while it is not known what the second brings."""
    two = RunDir(tmp_path / "run")
    finish(load_config("demo", ["run.num_rounds=2"]), two)
    found = said(two, capsys, "run.num_rounds=3")
    assert "validate(2)" in found and "generate(3)" not in found
    assert "generate(3)" in said(two, capsys, "run.num_rounds=3", "policy.lr=1e-3")


def test_the_small_llm_is_an_input_of_all_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RunDir(tmp_path / "run")
    found = said(store, capsys, "llm.path=bootstrap")
    assert list(found)[1] == "bootstrap(0)"
    finish(load_config("demo", ["llm.path=bootstrap"]), store)
    found = said(store, capsys, "llm.path=bootstrap", "bootstrap.epochs=2")
    assert found["bootstrap(0)"] == "would run: changed key bootstrap.epochs (1 -> 2)"
    assert found["encode(0)"] == found["generate(1)"] == "would run: after bootstrap(0)"


def test_what_rerankers_read_makes_counted_texts_and_rerankers_anew(
    store: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    found = said(store, capsys, 'reward.reader=["llm"]')
    assert found["encode(0)"] == "kept"
    assert found["references(0)"] == 'would run: changed key reward.reader (["statistics"] -> ["llm"])'
    assert found["train_reward(0)"] == "would run: after references(0)"


def test_no_text_is_sampled_for_a_reward_that_does_not_read(store: RunDir) -> None:
    """Refused before anything of the stage is touched; what is complete is kept all the same."""
    config, step = load_config("demo"), Selection(only="generate")
    edit(store, "reward", 0, stats={"shuffle_drop_ci95": [-0.01, 0.02]})
    made = store.require("generations", 1)
    with pytest.raises(UserError, match=r"the reward's rerankers do not read: .*\[-0\.0100, 0\.0200\]"):
        Runner(config, store, step).step("generate", 1)
    assert store.require("generations", 1) == made
    Runner(config, store, Selection()).step("generate", 1)


def test_no_ray_is_started(store: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    said(store, capsys, "run.seed=9")
    assert not ray.is_initialized()


def test_a_run_that_is_not_finished_says_how_far_it_came(store: RunDir) -> None:
    """Neither a whole run, nor a folder that is none, is refused here."""
    write_json(store.root / "config.json", load_config("demo").model_dump(mode="json"))
    with pytest.raises(UserError, match=r"an unfinished run: .* evaluate done, bootstrap not; "):
        check_came_to("per_list", 0, store.root)  # there is no summary yet
    write_json(store.root / "summary.json", {})
    check_came_to("per_list", 0, store.root)
    check_came_to("per_list", 0, store.root / "nowhere")
    check_came_to("per_list", 0, store.root.parent)
    (store.root / "config.json").unlink()
    with pytest.raises(
        UserError, match=r"an unfinished run: .* evaluate done, bootstrap not; run its recipe without --only"
    ):
        check_came_to("per_list", 0, store.root)
    for name, round_id in (("per_list", 0), ("heldout", 1), ("policy", 1), ("pairs", 1), ("users", 0)):
        (store.path(name, round_id) / MANIFEST).unlink()
    done, missing = how_far(store)
    assert done == ["encode", "references", "train_reward", "generate", "score"]
    assert missing == ["prepare", "bootstrap", "pair", "dpo", "validate", "evaluate"]
    with pytest.raises(UserError, match="score done, prepare, bootstrap, pair, "):
        check_came_to("pairs", 1, store.root)


def test_a_run_that_is_made_anew_has_no_summary(store: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its report: else new settings would stand beside the figures of old ones, in comparisons and model cards."""

    def fails(*_: object) -> Outcome:
        raise UserError("no room")

    config = load_config("demo", ["dpo.beta=0.5"])
    write_json(store.root / "config.json", config.model_dump(mode="json"))
    for name in ("summary.json", "report.html"):
        write_json(store.root / name, {})
    runner = Runner(config, store, Selection())
    runner.step("score", 1)
    assert is_finished(load_config("demo"), store), "what is kept changes nothing"
    monkeypatch.setitem(STAGES, "dpo", replace(STAGES["dpo"], run=fails))
    with pytest.raises(UserError, match="no room"):
        runner.step("dpo", 1)
    assert not (store.root / "summary.json").exists() and not (store.root / "report.html").exists()
    assert not is_finished(load_config("demo"), store)
    with pytest.raises(UserError, match="an unfinished run: "):
        check_came_to("per_list", 0, store.root)


TURNS = (
    "run.turns_per_round=2",
    "run.num_rounds=2",
    "run.patience=2",
    'policy.objective=["best_of_n", "dpo"]',
)


def test_turns_sample_and_train_and_rounds_are_encoded_and_validated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = said(RunDir(tmp_path / "run"), capsys, *TURNS)
    one, two = (
        [f"{name}({turn})" for name in names]
        for turn, names in (
            (1, ["generate", "score", "best_of_n"]),
            (2, ["generate", "score", "pair", "dpo", "encode", "validate"]),
        )
    )
    assert list(found)[4:13] == [*one, *two]
    assert list(found)[13:-2] == [
        f"{name}({turn})"
        for turn in (3, 4)
        for name in ("generate", "score", "pair", "dpo", *(("encode", "validate") if turn == 4 else ()))
    ]
    assert list(found)[-2:] == ["evaluate(4)", "report"]


def test_a_later_objective_leaves_the_first_turns_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = RunDir(tmp_path / "run")
    finish(load_config("demo", list(TURNS)), store)
    again = [*TURNS[:-1], 'policy.objective=["best_of_n", "grpo"]']
    found = said(store, capsys, *again)
    assert [step for step, what in found.items() if what.startswith("kept")][-3:] == [
        "best_of_n(1)",
        "generate(2)",
        "score(2)",
    ]
    assert found["grpo(2)"].startswith("would run: ")


def test_how_far_a_run_with_turns_came(tmp_path: Path) -> None:
    """encode and validate belong to the last turn of a round."""
    config = load_config("demo", list(TURNS))
    store = RunDir(tmp_path / "run")
    finish(config, store)
    assert how_far(store, config.policy.objectives)[1] == ["bootstrap"]


def test_a_run_is_finished_when_nothing_is_left_to_do(
    store: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    demo, changed = load_config("demo"), load_config("demo", ["dpo.beta=0.3"])
    assert not is_finished(demo, store), "without its summary"
    write_json(store.root / "summary.json", {})
    assert is_finished(demo, store) and not is_finished(changed, store)
    (store.path("per_list") / MANIFEST).unlink()
    assert not is_finished(demo, store)
    assert not is_finished(demo, RunDir(store.root / "nothing"))
    assert capsys.readouterr().out == ""
