"""The studies' variants, tables and sentences, from figures made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo4rec_ray.checks import check_all
from dpo4rec_ray.cli import study as command
from dpo4rec_ray.config import load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.store.schemas import HELDOUT_FIGURES
from dpo4rec_ray.studies import ablation, backbone_transfer, beta_loss, drift, n_samples, scale
from dpo4rec_ray.studies.every_study import QUESTIONS, study_of
from dpo4rec_ray.studies.measures import AGAINST, GAIN, READING, TEST_GAIN, own_gain
from dpo4rec_ray.studies.results import as_json, markdown, plot
from dpo4rec_ray.studies.study_parts import NAME, RECIPE, Measured, Row, said
from dpo4rec_ray.studies.variant_jobs import checkable, folder_name, planned


def about(mean: float, spread: float = 0.1, seeds: int = 1) -> Measured:
    """50 users around a mean, alike in every seed: half of them `spread` above, half below."""
    values = mean + spread * np.tile([-1.0, 1.0], 25)
    return Measured(tuple((values, np.arange(50)) for _ in range(seeds)))


# What a study asks of a recipe.
BY_TIME = ["data.protocol=time", "reward.num_redraws=0", "reranker.resample_negatives=false"]
ASKS = {"drift": [*BY_TIME, "data.drift_windows=3"]}


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_variant_is_a_sound_recipe_that_differs(name: str, tmp_path: Path) -> None:
    """Each changes the demo, no two are alike, and each has a run folder of its own."""
    small = ["sample.num_users=60", f"run.root={tmp_path}", *ASKS.get(name, ())]
    plain = load_config("demo", small)
    jobs = planned(name, study_of(name), "demo", small, [3, 4])
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs) and {3, 4} == {
        job.seed for job in jobs
    }
    assert len({job.store.root for job in jobs}) == len(jobs)
    told = [job.config.model_dump_json(exclude={"run": {"name", "root"}}) for job in jobs]
    assert len(set(told)) == len(told)
    for job in jobs:
        check_all(checkable(job.config, plain), "")
        assert job.config.run.seed == job.seed
        inside = job.name == RECIPE or job.store.root.parent == tmp_path / f"demo-study-{name}"
        assert inside and job.store.root.is_relative_to(tmp_path)
    assert study_of(name).variants(plain) == study_of(name).variants(plain)


def test_the_recipes_own_run_is_the_one_of_dpo4rec_run(tmp_path: Path) -> None:
    jobs = planned("n_samples", study_of("n_samples"), "demo", [f"run.root={tmp_path}"], [])
    assert jobs[0].name == RECIPE and jobs[0].store.root == tmp_path / "demo"
    seeds = planned("n_samples", study_of("n_samples"), "demo", [f"run.root={tmp_path}"], [0, 2])
    bases = [job.store.root.name for job in seeds if job.name == RECIPE]
    assert bases == ["demo", "demo-seed2"]


def test_what_a_recipe_has_not_is_not_left_out() -> None:
    plain = load_config("demo")
    names = set(ablation.variants(plain))
    assert {"random pairs", "swapped pairs", "no redraws", "no cross-fit"} <= names
    bare = load_config("demo", ["reward.num_redraws=0", "reward.num_folds=1"])
    assert names - set(ablation.variants(bare)) == {"no redraws", "no cross-fit"}
    others = ablation.variants(load_config("demo", ["pair.others_share=0.5"]))
    assert all("pair.others_share=0" in others[name] for name in (ablation.RANDOM, ablation.SWAPPED))
    assert others["pairs of own texts alone"] == ("pair.others_share=0",)
    assert n_samples.counts(10) == [2, 4, 8] and n_samples.counts(8) == [2, 4] and n_samples.counts(3) == [2]
    betas = beta_loss.variants(load_config("demo", ["dpo.beta=0.1", "dpo.label_smoothing=0.1"]))
    assert len(betas) == 8 and "sigmoid, beta 0.1" not in betas
    assert betas["ipo, beta 0.3"] == ("dpo.loss=ipo", "dpo.beta=0.3", "dpo.label_smoothing=0")
    assert scale.variants(load_config("demo"))["10 x"] == ("sample.num_users=6000",)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ablation", ["policy.objective=grpo"], "is about DPO"),
        ("ablation", ["run.num_rounds=0"], "one round at least"),
        ("ablation", ["llm.source=statistics"], 'llm.source = "vllm"'),
        ("n_samples", ["generate.num_samples=2"], "pair takes two"),
        ("scale", ["data.dataset=movielens"], "set data.max_users"),
        ("history_length", ["data.max_history=1"], "raise data.max_history"),
        ("drift", [], "set data.protocol=time and data.drift_windows=4"),
    ],
)
def test_a_recipe_without_such_a_study_is_refused(name: str, changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(name, study_of(name), "demo", changes, [])


def test_some_variants_alone() -> None:
    """With those that the study's sentence is about."""
    jobs = planned("ablation", study_of("ablation"), "demo", [], [], only=["no redraws"])
    assert [job.name for job in jobs] == ["recipe", "random pairs", "swapped pairs", "no redraws"]
    jobs = planned("n_samples", study_of("n_samples"), "demo", [], [], only=["N = 4"])
    assert [job.name for job in jobs] == ["recipe", "N = 4"]
    with pytest.raises(UserError, match="study drift needs all of its variants; leave --variant out"):
        planned("drift", study_of("drift"), "demo", ASKS["drift"], [], only=["cut 1"])
    with pytest.raises(UserError, match=r"n_samples has no variant 'N = 3'; there are: N = 2; N = 4; N = 8"):
        planned("n_samples", study_of("n_samples"), "demo", [], [], only=["N = 3"])


def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["ablatio", "demo"], "no study 'ablatio'; did you mean 'ablation'?"),
        (["ablation", "demo", "--seeds", "0,0"], "--seeds 0,0: write different whole numbers"),
        (["ablation", "demo", "--seeds", "-1"], "--seeds -1"),
        (["ablation", "demo", "--jobs", "0"], "--jobs 0"),
    ):
        assert command.main([*arguments[:2], *(f"{one}" for one in arguments[2:])]) == 2
        assert message in capsys.readouterr().err


def table(recipe: float, random: float, swapped: float) -> list[Row]:
    means = {RECIPE: recipe, ablation.RANDOM: random, ablation.SWAPPED: swapped, ablation.CHOSEN: 0.2}
    return [{NAME: name, GAIN: about(mean), TEST_GAIN: about(mean / 2)} for name, mean in means.items()]


def test_the_ablations_verdict() -> None:
    """Interval half width 1.96 x .1 / sqrt(50) = .028."""
    sound = ablation.sentence(table(0.1, 0.01, -0.1))
    assert ": the held-out gain is the preference signal's." in sound and "DPO keeps 50% of it" in sound
    assert "swapped pairs -0.1000 [-0.1" in sound and sound.endswith(
        "swapped pairs -0.0500 [-0.0780, -0.0220]."
    )
    for doubtful in ((0.02, 0.01, -0.1), (0.1, 0.05, -0.1), (0.1, 0.01, -0.02)):
        assert "this does not show" in ablation.sentence(table(*doubtful))


def test_sentences_of_other_studies() -> None:
    rows: list[Row] = [
        {NAME: f"N = {count}", GAIN: about(gain)} for count, gain in ((1, 0.0), (2, 0.05), (10, 0.1))
    ]
    assert "; fewer texts of the same generation: N = 2 +0.0500 [" in n_samples.sentence(rows)
    assert "], 50% of it." in n_samples.sentence(rows)
    nothing = [*rows[:-1], {**rows[-1], GAIN: about(-0.004)}]
    assert "%" not in n_samples.sentence(nothing), "of no gain there is no share"
    grid: list[Row] = [
        {NAME: name, GAIN: about(gain), AGAINST: about(0)} for name, gain in (("a", 0.1), ("b", 0.3))
    ]
    assert "b gains most" in beta_loss.sentence(grid) and "a least" in beta_loss.sentence(grid)
    square: list[Row] = [
        {
            NAME: mine,
            **{
                backbone_transfer.final(one): about(0.2 if one == mine else 0.1)
                for one in backbone_transfer.RERANKERS
            },
        }
        for mine in backbone_transfer.RERANKERS
    ]
    told = backbone_transfer.sentence(square)
    assert "is the final one +0.2000" in told and "is another +0.1000" in told


def test_differences_are_paired_and_refused_where_they_cannot_be() -> None:
    mine, theirs = about(0.3), about(0.1)
    assert mine.minus(theirs).interval[:3] == pytest.approx((0.2, 0.2, 0.2))
    with pytest.raises(ValueError, match="not paired"):
        mine.minus(Measured(((np.zeros(50), np.arange(1, 51)),)))


def test_the_page_shows_every_row_with_what_was_kept() -> None:
    rows: list[Row] = [
        {NAME: "recipe", GAIN: about(0.1, seeds=2), "cost": 1234.0},
        {NAME: "<b>other</b>", GAIN: None, "cost": 0.5},
    ]
    jobs = planned("n_samples", study_of("n_samples"), "demo", [], [])
    stages = {"other, seed 0": {"prepare(0)": "kept", "dpo(1)": "redone", "dpo(2)": "kept"}}
    page = markdown("n_samples", "these rerankers", "It grows.", [0, 1], rows, stages, jobs)
    assert "is judged by these rerankers, since" in page and "its own users" in study_of("scale").judged_by
    assert "**It grows.**" in page and said(rows[0][GAIN]) in page and "1,234" in page
    assert "dpo(1): redone, dpo(2): kept" in page and "dpo4rec run demo run.seed=0" in page
    assert [one["mean"] for one in as_json(rows[0][GAIN])["by_seed"]] == pytest.approx([0.1, 0.1])
    assert json.loads(json.dumps(as_json(rows[0][GAIN])))["ci95"][0] < 0.1
    picture = plot(study_of("n_samples"), rows).decode()
    assert picture.startswith("<svg") and "<b>" not in picture


def test_names_of_variants_are_folders() -> None:
    assert folder_name("sigmoid, beta 0.3/../x") == "sigmoid--beta-0.3-..-x"


def test_a_later_cut_with_the_first_policy_has_that_of_its_seed(tmp_path: Path) -> None:
    """Where the policy will be a whole model, and it is known which round is the last."""
    asks = [*ASKS["drift"], f"run.root={tmp_path}"]
    jobs = {(job.name, job.seed): job for job in planned("drift", study_of("drift"), "demo", asks, [0, 2])}
    for seed, base in ((0, "demo"), (2, "demo-seed2")):
        later = jobs["cut 2, first policy", seed].config
        assert later.llm.path == str(tmp_path / base / "rounds" / "01" / "policy" / "merged")
        assert later.data.known_windows == 2 and later.run.num_rounds == 0
        assert jobs["cut 2", seed].config.llm.path == "bundled"
    warmer = ["run.num_rounds=2", "run.patience=2", "generate.temperature=[1.0, 0.7]"]
    [config] = [
        job.config
        for job in planned("drift", study_of("drift"), "demo", [*asks, *warmer], [])
        if job.name == "cut 1, first policy"
    ]
    assert config.llm.path.endswith("rounds/02/policy/merged") and config.generate.temperature == 0.7
    for other in ("run.num_rounds=auto", "run.num_rounds=2", "llm.lora_mode=lora"):
        assert list(drift.variants(load_config("demo", [*asks, other]))) == ["cut 1", "cut 2"]
    counted = [*ASKS["drift"], "llm.source=statistics", "run.num_rounds=0"]
    names = [job.name for job in planned("drift", study_of("drift"), "demo", counted, [])]
    assert names == ["recipe", "cut 1", "cut 2"]


def test_the_gain_of_a_run_of_several_rounds_is_since_its_base_llm(tmp_path: Path) -> None:
    """Rounds of two turns; the second round has a user less, and began where the first ended."""
    store = RunDir(tmp_path)
    (tmp_path / "config.json").write_text(load_config("demo", ["run.turns_per_round=2"]).model_dump_json())
    for turn, users, before, after in ((2, [3, 1, 2], -2.0, -1.5), (4, [1, 3], -1.5, -1.6)):
        rows = {"round": np.full(len(users), turn, np.int32), "user_id": np.array(users)}
        for name in HELDOUT_FIGURES:
            for side, value in (("before", before), ("after", after)):
                own = (value, 2 * value)[name == "others_reward"]
                rows[f"{name}_{side}"] = np.array([own + 0.1 * user for user in users], np.float32)
        store.start("heldout", turn)
        store.write("heldout", pa.table(rows), turn)
        store.finish(Manifest(artifact="heldout", fingerprint="x", rows=len(users)), turn)
    store.start("per_list")
    store.finish(Manifest(artifact="per_list", fingerprint="x", rows=0, stats={"last_round": 4}))
    found = own_gain(store)
    changed, users = found[GAIN]
    assert users.tolist() == [1, 3] and changed == pytest.approx([0.4, 0.4])
    assert found[READING][0] == pytest.approx([-0.4, -0.4])
