from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dpo4rec_ray.config import Config, default_config, load_config, read_config
from dpo4rec_ray.config.recipe import RunSection
from dpo4rec_ray.config.section import merged
from dpo4rec_ray.config.training import PolicySection
from dpo4rec_ray.errors import UserError

RECIPES = sorted((Path(__file__).parents[2] / "jobs" / "recipes").glob("*.toml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "my_recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_in_the_repository_loads(path: Path) -> None:
    assert load_config(path).run.name == path.stem


def test_overrides_win_and_keep_their_types(tmp_path: Path) -> None:
    path = write(tmp_path, "[generate]\nnum_samples = 4\n")
    config = load_config(
        path, ["generate.num_samples=6", "data.raw_dir=some/where", "reranker.similarity=false"]
    )
    assert config.generate.num_samples == 6
    assert config.data.raw_dir == "some/where"
    assert config.reranker.similarity is False
    assert config.run.name == "my_recipe"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[generate]\nnum_sample = 4\n", ["generate.num_sample", "'num_samples'"]),
        ("[generat]\nnum_samples = 4\n", ["[generat]", "'generate'"]),
        ("[generate]\nnum_samples = 0\n", ["generate.num_samples", "0", "greater than or equal to 2"]),
        ("[generate]\nnum_samples = 'many'\n", ["generate.num_samples", "'many'"]),
        ("[data]\nblock_size = 11\n", ["block_size 11", "num_candidates 10"]),
        ("generate = 3\n", ["[generate]", "must be a section"]),
        ("[generate\n", ["not valid TOML"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, text))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "override", ["num_samples=4", "generate.num_samples", "=4", "generate.=4", "reranker..lr=4"]
)
def test_malformed_override(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"section\.key=value"):
        load_config(write(tmp_path, ""), [override])


def test_fragments_are_merged_in_order_and_overrides_come_last(tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        "[reranker]\nlr = 0.1\nepochs = 7\n[reranker.per_backbone.dlcm]\nlr = 0.2\nbatch_size = 64\n",
    )
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text("[reranker.per_backbone.dlcm]\nlr = 0.3\n[reranker.per_backbone.prm]\nlr = 0.4\n")
    second.write_text("[reranker]\nepochs = 9\n[reranker.per_backbone.prm]\nlr = 0.5\n")
    changes = [
        "reranker.per_backbone.dlcm.epochs=3",
        str(first),
        "reranker.per_backbone.mir.lr=0.6",
        str(second),
    ]
    config = load_config(recipe, changes)
    assert config.run.name == "my_recipe"
    assert (config.reranker.lr, config.reranker.epochs) == (0.1, 9)
    assert config.reranker.per_backbone == {
        "dlcm": {"lr": 0.3, "batch_size": 64, "epochs": 3},
        "prm": {"lr": 0.5},
        "mir": {"lr": 0.6},
    }
    assert config.reranker.of("dlcm").epochs == 3
    assert config.reranker.of("prm").epochs == 9
    assert load_config(recipe, [str(second), str(first)]).reranker.per_backbone["prm"] == {"lr": 0.4}
    assert (
        load_config(recipe, [str(first), "reranker.per_backbone.dlcm.lr=0.7"]).reranker.of("dlcm").lr == 0.7
    )


def test_an_override_may_end_like_a_fragment_and_a_fragments_name_may_hold_an_equals_sign(
    tmp_path: Path,
) -> None:
    recipe = write(tmp_path, "")
    assert load_config(recipe, ["data.file=events.toml"]).data.file == "events.toml"
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    (folder / "found.toml").write_text("[reranker]\nlr = 0.1\n")
    assert load_config(recipe, [str(folder / "found.toml")]).reranker.lr == 0.1


def test_overrides_reach_into_a_table_of_strings(tmp_path: Path) -> None:
    recipe = write(tmp_path, '[table.attributes]\ngenre = "genres"\n')
    config = load_config(recipe, ["table.attributes.year=released"])
    assert config.table.attributes == {"genre": "genres", "year": "released"}


@pytest.mark.parametrize(
    ("fragment", "words"),
    [
        ("[reranker]\nlrr = 0.1\n", ["fragment", "found.toml", "reranker.lrr", "'lr'"]),
        ("[rerank]\nlr = 0.1\n", ["fragment", "found.toml", "[rerank]", "'reranker'"]),
        ("[reranker.per_backbone.dlcm]\nlrr = 0.1\n", ["found.toml", "per_backbone.dlcm", "lrr", "'lr'"]),
        (
            "[reranker.per_backbone.dlcm]\nlr = -1\n",
            ["my_recipe.toml with", "found.toml", "-1", "greater than 0"],
        ),
        ("[reranker]\nper_backbone = 3\n", ["reranker.per_backbone = 3", "dictionary"]),
        ("[reranker\n", ["fragment", "found.toml", "not valid TOML"]),
    ],
)
def test_mistakes_in_a_fragment_are_named(tmp_path: Path, fragment: str, words: list[str]) -> None:
    found = tmp_path / "found.toml"
    found.write_text(fragment)
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, ""), [str(found)])
    message = str(error.value)
    assert "\n" not in message
    assert "Value error" not in message
    for word in words:
        assert word in message


def test_missing_fragment(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fragment no/such\.toml: cannot be read"):
        load_config(write(tmp_path, ""), ["no/such.toml"])


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    recipe = write(tmp_path, "[reranker]\nlr = 0.1\n")
    with pytest.raises(UserError, match=r"'reranker\.lr' is not a table"):
        load_config(recipe, ["reranker.lr.x=1"])
    with pytest.raises(UserError, match=r"reranker\.epochs: Input should be a valid integer"):
        load_config(recipe, ["reranker.epochs.x=1"])


def test_missing_recipe() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_config("no/such/recipe.toml")


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 3  # type: ignore[misc]


def test_section_hash_follows_its_sections_and_the_seed() -> None:
    base = Config()
    other = Config.model_validate({"dpo": {"beta": 0.5}})
    seeded = Config.model_validate({"run": {"seed": 1}})
    assert base.section_hash("generate") == other.section_hash("generate")
    assert base.section_hash("dpo") != other.section_hash("dpo")
    assert base.section_hash("generate") != seeded.section_hash("generate")


@pytest.mark.parametrize("section", list(Config.model_fields))
def test_every_key_says_what_it_means(section: str) -> None:
    """The string below a field is its documentation: a sentence of its own, that ends with a full stop."""
    for key, field in Config.model_fields[section].annotation.model_fields.items():
        assert field.description and field.description.rstrip('"\n')[-1] in ".)", f"{section}.{key}"


def test_section_hash_can_leave_a_key_out() -> None:
    base, fewer = default_config(), default_config(["generate.user_frac=0.5"])
    without = ("generate", "-generate.user_frac")
    assert base.section_hash(*without) == fewer.section_hash(*without)
    assert base.section_hash(*without, "generate.user_frac") != fewer.section_hash(
        *without, "generate.user_frac"
    )
    assert base.section_hash(*without) != default_config(["generate.top_p=0.5"]).section_hash(*without)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[dpo]\naccumulation = 4\n", "dpo.accumulation is called policy.gradient_accumulation_steps now"),
        ("[bootstrap]\naccumulation = 4\n", "bootstrap.gradient_accumulation_steps now"),
        ('[llm]\nlora_mode = "adapter"\n', "llm.lora_mode = 'adapter' is called 'lora' now"),
    ],
)
def test_a_recipe_of_an_older_release_is_told_the_new_name(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        load_config(write(tmp_path, text))


def test_the_config_of_an_older_run_is_read(tmp_path: Path) -> None:
    stored = Config().model_dump(mode="json")
    trained = stored.pop("policy")  # its keys stood in [dpo]
    stored["pair"]["max_heldout_users"] = 7
    del trained["objective"], trained["max_heldout_users"]
    stored["dpo"] |= trained | {"lr": 0.25}
    for section, value in (("dpo", 4), ("bootstrap", 2)):
        del stored[section]["gradient_accumulation_steps"]
        stored[section]["accumulation"] = value
    stored["llm"]["lora_mode"] = "adapter"
    (tmp_path / "config.json").write_text(json.dumps(stored))
    found = read_config(tmp_path)
    assert (found.policy.gradient_accumulation_steps, found.bootstrap.gradient_accumulation_steps) == (4, 2)
    assert (found.policy.lr, found.policy.max_heldout_users) == (0.25, 7)
    assert found.llm.lora_mode == "lora"


def test_the_global_batch_size_counts_all_workers_and_micro_steps() -> None:
    section = PolicySection(batch_size=2, gradient_accumulation_steps=3, num_workers=4)
    assert section.global_batch_size == 24


def test_merged_goes_into_tables_and_leaves_what_is_unset() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merged(base, {"a": {"c": 4}, "d": {"e": 5}}) == {"a": {"b": 1, "c": 4}, "d": {"e": 5}}
    assert merged(base, {"a": {"b": "auto", "c": 4}, "d": "auto"}, unset="auto") == {
        "a": {"b": 1, "c": 4},
        "d": 3,
    }
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}


def test_a_template_file_is_read_with_the_recipe(tmp_path: Path) -> None:
    """The run keeps its text: the file may be gone, and a change of it counts like a change of the recipe."""
    file = tmp_path / "prompt.txt"
    recipe = write(tmp_path, f'[prompt]\ntemplate_file = "{file}"\n')
    hashes = set()
    for text in ("{history}\nWhy {{this}}?\n", "{history}\nWhy?\n"):
        file.write_text(text)
        config = load_config(recipe)
        assert (config.prompt.template, config.prompt.template_file) == (text.rstrip("\n"), "")
        hashes.add(config.section_hash("prompt"))
    assert len(hashes) == 2
    with pytest.raises(UserError, match=r"prompt\.template is set too; set one of them"):
        load_config(recipe, ["prompt.template={history}"])
    file.write_text(" \n")
    with pytest.raises(UserError, match="the file is empty"):
        load_config(recipe)
    file.unlink()
    with pytest.raises(UserError, match=r"prompt\.template_file = .*cannot be read"):
        load_config(recipe)


def test_factors_are_a_name_or_words(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, ""), ["prompt.factors=books"]).prompt.factors == "books"
    assert load_config(write(tmp_path, '[prompt]\nfactors = ["pace", "plot"]\n')).prompt.factors == (
        "pace",
        "plot",
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("generate.label_selector.zone=in(a", "generate.label_selector: zone = 'in(a' is none of"),
        ("encoder.resources.GPU=1", "encoder.resources: GPU has a key of its own"),
        ("reward.resources.disk=0", "greater than 0"),
        ("policy.gpus_per_worker=1.5", "above 1 it is a whole number"),
        ("evaluate.placement_strategy=STRICT", "'PACK' or 'SPREAD'"),
        ("generate.min_engines=3", "min_engines = 3 is above num_engines = 1"),
    ],
)
def test_placement_that_ray_would_not_take(override: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        default_config([override])


def test_a_lora_that_no_engine_serves() -> None:
    with pytest.raises(UserError, match=r"policy\.lora_rank.* less than or equal to 512"):
        default_config(["policy.lora_rank=513"])


def test_where_work_runs_is_in_no_fingerprint() -> None:
    changes = ["accelerator_type=A10G", "label_selector.zone=a", "resources.disk=1", "memory_gib=2"]
    for section in ("generate", "encoder", "reward", "policy", "bootstrap", "evaluate"):
        placed = default_config([f"{section}.{change}" for change in changes])
        assert placed.section_hash(section) == default_config().section_hash(section)


def test_turns_are_counted_through_the_rounds() -> None:
    run = RunSection(num_rounds=2, turns_per_round=3)
    assert run.num_turns == 6
    assert [run.round_of(turn) for turn in range(7)] == [0, 1, 1, 1, 2, 2, 2]
    assert [run.first_turn(turn) for turn in range(1, 7)] == [1, 1, 1, 4, 4, 4]
    assert [turn for turn in range(1, 7) if run.ends_round(turn)] == [3, 6]
    assert (list(run.round_ends(6)), list(run.round_ends(3)), list(run.round_ends(0))) == (
        [0, 3, 6],
        [0, 3],
        [0],
    )


def test_learners_are_named_by_turn_and_the_last_one_holds_on() -> None:
    several = default_config(['policy.objective=["best_of_n", "dpo"]']).policy
    assert [several.objective_of(turn) for turn in (1, 2, 3)] == ["best_of_n", "dpo", "dpo"]
    assert default_config(["policy.objective=grpo"]).policy.objective_of(5) == "grpo"
    with pytest.raises(UserError, match="name one at least"):
        default_config(["policy.objective=[]"])


@pytest.mark.parametrize(
    ("chosen", "expected"), [("previous", [0, 0, 2, 2]), ("turn", [0, 1, 2, 3]), ("base", [0, 0, 0, 0])]
)
def test_the_reference_of_each_turn(chosen: str, expected: list[int]) -> None:
    config = default_config(
        ["run.turns_per_round=2", "run.num_rounds=2", f"policy.reference_policy={chosen}"]
    )
    assert [config.reference_of(turn) for turn in range(1, 5)] == expected


@pytest.mark.parametrize(
    "key",
    ["top_p=0.9", "top_k=5", "min_p=0.1", "repetition_penalty=1.1", "presence_penalty=1", "format=json"],
)
def test_probabilities_are_kept_of_whole_distributions_alone(key: str) -> None:
    whole = ["generate.token_logps=true", "generate.top_p=1"]
    assert default_config(whole).generate.token_logps
    with pytest.raises(UserError, match=f"token_logps with {key.partition('=')[0]} = "):
        default_config([*whole, f"generate.{key}"])


@pytest.mark.parametrize("override", ["run.name=", 'run.name=""'])
def test_an_empty_name_is_the_recipes(override: str) -> None:
    """As `run.name=$NAME` gives it where the variable is not set; run.root itself would be the run folder."""
    assert load_config("demo", [override]).run.name == "demo"
    assert load_config("demo", ["run.name=mine"]).run.name == "mine"


def test_a_container_of_azure_is_no_secret() -> None:
    uri = "abfs://raw@shop.dfs.core.windows.net/events"
    assert load_config("own_table", [f"data.raw_dir={uri}"]).data.raw_dir == uri
    with pytest.raises(
        UserError, match=r"'abfs://\.\.\.@shop.dfs.core.windows.net/events': keys do not belong"
    ):
        load_config("own_table", ["data.raw_dir=abfs://raw:KEY@shop.dfs.core.windows.net/events"])
