"""What a recipe is asked before anything starts, where it depends on llm.source, and every name against its registry."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from dpo4rec_ray import checks, identity
from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.pipeline import before_rounds
from dpo4rec_ray.running import Selection, check_selection
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.texts.sources import SOURCES
from tests.conftest import DEMO, ROOT

STATISTICS = 'llm.source="statistics"'


def check(*overrides: str, only: str = "") -> None:
    checks.check_all(load_config(DEMO, list(overrides)), only)


@pytest.mark.parametrize(
    "override",
    [
        "llm.path=/nowhere/at/all",
        "llm.max_model_len=64",
        "generate.gpus_per_engine=1",
        "llm.max_model_len=4096",
    ],
)
def test_without_an_llm_nothing_about_one_is_checked(override: str) -> None:
    check(STATISTICS, override, "generate.max_new_tokens=100")


@pytest.mark.parametrize(
    "override", ["llm.path=/nowhere/at/all", "llm.max_model_len=64", "llm.max_model_len=4096"]
)
def test_with_an_llm_the_same_is_refused(override: str) -> None:
    with pytest.raises(UserError):
        check(override, "generate.max_new_tokens=100")


def test_a_split_by_time_needs_times() -> None:
    own = ["table.timestamp=", STATISTICS, "data.raw_dir=/nowhere"]
    with pytest.raises(UserError, match=r'table\.timestamp = "": no times are set, .*data\.protocol=user'):
        checks.check_all(load_config("own_table", own), "prepare")
    with pytest.raises(UserError, match="/nowhere: there is no such folder"):
        checks.check_all(load_config("own_table", [*own, "data.protocol=user"]), "prepare")


def test_rounds_that_train_nothing() -> None:
    check(STATISTICS, "run.num_rounds=0")
    check(STATISTICS, "run.num_rounds=1")
    with pytest.raises(UserError, match="a second round would only repeat"):
        check(STATISTICS, "run.num_rounds=3")
    with pytest.raises(UserError, match=r"run\.turns_per_round = 2, but"):
        check(STATISTICS, "run.turns_per_round=2")
    check("run.num_rounds=3")
    check("run.num_rounds=0")
    check("run.turns_per_round=2")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('evaluate.backbones=["prm", "prn"]', "evaluate.backbones = 'prn' is unknown; known: .*prm"),
        ("reranker.per_backbone={prn={lr=0.1}}", "reranker.per_backbone = 'prn' is unknown"),
        ('reranker.per_backbone={prm={adapter="x"}}', "reranker.per_backbone.prm.adapter = 'x' is unknown"),
        ('reranker.per_backbone={prm={metric="x@5"}}', "reranker.per_backbone.prm.metric: .*x@5"),
        ("reranker.metric=ndcg", "reranker.metric: .*ndcg"),
        ("reward.metric=loglik", "reward.metric: .*loglik.*log_likelihood"),
        ('reward.compare=["ndcg@5", "ndgc@5"]', "reward.compare: .*ndgc@5"),
    ],
)
def test_every_name_is_looked_up(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(override)


def test_redraws_of_one_backbone_are_refused_too() -> None:
    stay = ["data.protocol=time", "reward.num_redraws=0", "reranker.resample_negatives=false"]
    check(*stay, only="prepare")
    with pytest.raises(UserError, match="resample_negatives"):
        check(*stay, "reranker.per_backbone={dlcm={resample_negatives=true}}", only="prepare")


def test_what_stands_in_place_of_the_base_llm_has_an_identity(tmp_path: Path) -> None:
    """Without a look at llm.path, which need not exist; another source is another policy 0."""
    store = RunDir(tmp_path)
    bootstrap = load_config(DEMO, [STATISTICS, "llm.path=bootstrap"])
    bundled = load_config(DEMO)
    found = {
        config.llm.source: SOURCES[config.llm.source].identity(config, store)
        for config in (bootstrap, bundled)
    }
    assert found["statistics"].startswith("statistics ")
    assert found["statistics"] != found["vllm"]


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], ["prepare", "encode", "references", "train_reward"]),
        (["llm.path=bootstrap"], ["prepare", "bootstrap", "encode", "references", "train_reward"]),
        (["llm.path=bootstrap", "run.num_rounds=0"], ["prepare", "bootstrap", "encode", "references"]),
        ([STATISTICS, "llm.path=bootstrap"], ["prepare", "encode", "references", "train_reward"]),
        ([STATISTICS, "run.num_rounds=0"], ["prepare", "encode", "references"]),
    ],
)
def test_the_steps_before_the_rounds(overrides: list[str], steps: list[str]) -> None:
    assert before_rounds(load_config(DEMO, overrides)) == steps


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["reward.hard_negatives=1", "reward.num_redraws=0"], "reward.hard_negatives = 1.0"),
        (["pair.shrinkage=true"], "set pair.min_margin too"),
        (["pair.shrinkage=true", "pair.min_margin=0.1", "pair.min_std_errors=1"], "set only one of them"),
        (["pair.pairs_per_user=2"], 'pair.pairs_per_user = 2 needs pair.rule = "top_vs_bottom"'),
        (
            ["pair.pairs_per_user=2", "pair.rule=top_vs_bottom", "pair.num_rejected=2"],
            "and pair.num_rejected = 1",
        ),
        (["reranker.num_heads=3"], "reranker.hidden_dim = 64 is not a multiple of num_heads = 3"),
        (['evaluate.backbones=["dlcm", "dlcm"]'], "names one twice"),
        (['policy.objective=["dpo", "ppo"]'], "policy.objective = 'ppo' is unknown; known: dpo, best_of_n"),
        (["run.retrain_reward=true"], 'statistics texts alone, .* add "llm" to reward.reader'),
        (['policy.objective=["best_of_n", "dpo"]', "run.keep_pairs=true"], "makes no pairs in some turn"),
        (["grpo.sampler=corrected"], "set generate.token_logps=true too"),
        (["llm.path=./nomodel"], r"^llm.path ./nomodel: no such folder$"),
        (["llm.path=models/my/llm"], r"^llm.path models/my/llm: no such folder$"),
    ],
)
def test_settings_that_contradict_each_other(changes: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        checks.check_all(load_config("jobs/recipes/demo.toml", changes))


def test_implicit_feedback_needs_two_settings() -> None:
    clicks, settings = (
        ["data.dataset=table", "table.rating="],
        ["data.positive_rating=1", "prompt.ratings=false"],
    )
    for some in ([], settings[:1], settings[1:]):
        with pytest.raises(UserError, match=r"set data\.positive_rating=1, .* and prompt\.ratings=false"):
            checks.check_all(load_config("jobs/recipes/demo.toml", [*clicks, *some]))
    with pytest.raises(UserError, match=r"data\.raw_dir is not set"):  # the next check
        checks.check_all(load_config("jobs/recipes/demo.toml", [*clicks, *settings]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "generate.engine_args={max_num_sequences=8}",
            r"max_num_sequences: vLLM [0-9.]+ has no such argument; did you mean",
        ),
        ('generate.engine_args={model="x"}', "engine_args.model is not set here; its place is llm.path"),
        (
            'generate.engine_args={hf_token="hf_x"}',
            "hf_token is not set here; .* the environment variable HF_TOKEN",
        ),
        ("generate.engine_args={trust_remote_code=true}", "trust_remote_code is not set here; .* it is off"),
        (
            'generate.engine_args={load_format="pt"}',
            "load_format = 'pt': other formats than safetensors, dummy",
        ),
    ],
)
def test_engine_arguments_are_those_of_the_installed_vllm(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(override)


def test_engine_arguments_that_vllm_knows() -> None:
    check('generate.engine_args={block_size=16, load_format="dummy", seed=3}')


def test_an_engine_of_several_processes_takes_whole_gpus() -> None:
    parallel = "generate.tensor_parallel_size=2"
    check(parallel)
    with pytest.raises(
        UserError, match=r"gpus_per_engine = 0\.5, but tensor_parallel_size x pipeline_parallel_size = 2"
    ):
        check(parallel, "generate.gpus_per_engine=0.5")
    with pytest.raises(UserError, match="vLLM's CPU engine cannot run under Ray"):
        check(parallel, "generate.distributed_executor_backend=ray")


def test_json_needs_room_for_its_factors() -> None:
    check('generate.format="json"', "generate.max_new_tokens=64")
    with pytest.raises(UserError, match="too few for JSON with a string for each of 9 factors"):
        check('generate.format="json"', "generate.max_new_tokens=64", "prompt.factors=movies")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ['policy.storage_path="s3://KEY:SECRET@bucket"'],
            "policy.storage_path carries a user name or password",
        ),
        (['policy.storage_path="nowhere://bucket"'], "policy.storage_path = 'nowhere://bucket' is no place"),
        (['llm.dtype="float16"', "policy.zero_stage=0"], "set policy.zero_stage = 1"),
        (
            ['policy.deepspeed="/nowhere/own.json"'],
            "policy.deepspeed /nowhere/own.json: not a readable JSON file",
        ),
    ],
)
def test_what_training_cannot_do_is_refused_before_anything_runs(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        check(*overrides)
    assert "SECRET" not in str(refused.value)


def test_a_deepspeed_file_counts_by_what_is_in_it(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    config = load_config(DEMO, [f'policy.deepspeed="{file}"'])
    found = set()
    for content in ('{"steps_per_print": 1}', '{"steps_per_print": 2}'):
        file.write_text(content)
        found.add(identity.outside_identity(config, "dpo", ("policy",))["file of policy.deepspeed"])
    assert len(found) == 2


def as_many_rounds_as_may_be(source: str) -> Config:
    """Two; without training, one."""
    rounds = 2 if source == "vllm" else 1
    return load_config(DEMO, [f'llm.source="{source}"', f"run.num_rounds={rounds}"])


@pytest.mark.parametrize(
    ("source", "selection"),
    [
        ("vllm", Selection()),
        ("vllm", Selection(only="prepare")),
        ("vllm", Selection(only="encode")),
        ("vllm", Selection(since="dpo", round_id=2)),
        ("vllm", Selection(only="encode", round_id=0)),
        ("vllm", Selection(only="evaluate", round_id=1)),
        ("vllm", Selection(since="report")),
        ("statistics", Selection(only="pair", round_id=1)),
    ],
)
def test_a_step_that_a_recipe_has(source: str, selection: Selection) -> None:
    check_selection(as_many_rounds_as_may_be(source), selection)


@pytest.mark.parametrize(
    ("source", "selection"),
    [
        ("vllm", Selection(only="bootstrap")),
        ("vllm", Selection(since="dpo", round_id=3)),
        ("vllm", Selection(only="prepare", round_id=1)),
        ("vllm", Selection(only="generate", round_id=0)),
        ("statistics", Selection(only="dpo")),
        ("statistics", Selection(since="pair", round_id=2)),
    ],
)
def test_a_step_that_a_recipe_lacks(source: str, selection: Selection) -> None:
    config = as_many_rounds_as_may_be(source)
    with pytest.raises(UserError, match=f"no such step in this recipe: {selection.described}"):
        check_selection(config, selection)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dpo.loss=signoid"], "dpo.loss = 'signoid' is unknown; known: sigmoid"),
        (["llm.source=gpt"], "llm.source = 'gpt' is unknown; known: vllm"),
        (["dpo.loss=hinge", "dpo.label_smoothing=0.1"], "dpo.loss = 'hinge' has none; set it to 0"),
    ],
)
def test_names_of_losses_and_sources_come_from_their_registries(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        check(*overrides)
    check("dpo.loss=robust", "dpo.label_smoothing=0.1")


BUNDLED = ROOT / "dpo4rec_ray" / "policy" / "bundled"


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    """A copy of the bundled LLM."""
    return Path(shutil.copytree(BUNDLED, tmp_path / "llm"))


def test_a_whole_llm_folder_is_accepted(llm: Path) -> None:
    check(f"llm.path={llm}")


@pytest.mark.parametrize("key", ["llm.path", "encoder.path"])
@pytest.mark.parametrize("content", [b"", b"\x80" * 4096], ids=["empty", "garbage"])
def test_a_damaged_file_of_weights(llm: Path, key: str, content: bytes) -> None:
    (llm / "more.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"{key}: .*more.safetensors is damaged .*download it again"):
        check(f"{key}={llm}")


def test_a_part_that_the_index_names_is_missing(llm: Path) -> None:
    weights = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (llm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing"):
        check(f"llm.path={llm}")


@pytest.mark.parametrize("name", ["WonderForCausalLM", "BertForMaskedLM"])
def test_an_architecture_that_cannot_be_trained(llm: Path, name: str) -> None:
    """Where nothing is trained, the engine decides."""
    file = llm / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": [name]}))
    with pytest.raises(UserError, match=rf"llm.path .*architectures = \['{name}'\]"):
        check(f"llm.path={llm}")
    check(f"llm.path={llm}", "run.num_rounds=0")


def test_a_hub_name_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint is about the hub, not about files of a folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"llm.path no-one/no-such-llm: .*hub name.*HF_HOME.*HF_TOKEN"):
        check("llm.path=no-one/no-such-llm")


@pytest.mark.parametrize(
    "own", ["prompt.system=Hi", "prompt.lead_in=He", "prompt.examples=1", "prompt.style=completion"]
)
def test_a_bootstrapped_llm_knows_only_the_question(own: str) -> None:
    with pytest.raises(
        UserError, match=r'llm\.path = "bootstrap" trains an LLM that knows only the question'
    ):
        check("llm.path=bootstrap", own)


def test_how_an_llm_is_asked_is_remarked_upon(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = shutil.copytree(BUNDLED, tmp_path / "base", ignore=shutil.ignore_patterns("chat_template.jinja"))
    for style, said in (("chat", True), ("auto", False), ("completion", False)):
        check(f"llm.path={base}", f"prompt.style={style}", "run.num_rounds=0")
        assert ("it has no chat template" in capsys.readouterr().out) == said


def test_templates_are_read_before_anything_starts() -> None:
    with pytest.raises(UserError, match=r"prompt\.template: \{titles\} is no placeholder that is known"):
        check("prompt.template={history} {titles}")
    with pytest.raises(UserError, match="an endpoint of chat completions begins its answers itself"):
        check("llm.source=openai", "openai.model=x", "prompt.lead_in=He likes", "run.num_rounds=0")


def test_four_bits_need_their_package_where_the_training_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster the driver is on a machine without a GPU, and the workers look."""
    config = load_config("demo", ["policy.quantize=4bit", "policy.gpus_per_worker=1"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    checks.check_training(config)
    monkeypatch.setenv("RAY_ADDRESS", "")
    with pytest.raises(UserError, match="needs the package bitsandbytes"):
        checks.check_training(config)
