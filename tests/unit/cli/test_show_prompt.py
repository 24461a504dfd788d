"""dpo4rec prompts on prepared data of three users."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from dpo4rec_ray.cli import show_prompt
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from tests.unit.knowledge.conftest import BUNDLED


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    """The arguments that name a run with 30 items: user b (train) knows two, user c (test) all of them."""
    store = RunDir(tmp_path / "mine")
    users = {
        "user_id": [0, 1, 2],
        "raw_id": ["a", "b", "c"],
        "profile": ["", "a nurse", ""],
        "split": ["valid", "train", "test"],
        "fold": [0, 0, 0],
        "history_item_ids": [[0], [0, 1], list(range(30))],
        "history_ratings": [[4.0], [5.0, 1.0], [4.0] * 30],
    }
    items = {
        "item_id": list(range(30)),
        "raw_id": [str(i) for i in range(30)],
        "title": ["Silent Harbor", "x" * 400, *[f"Iron Mirror {i}" for i in range(28)]],
        "attributes": [["genre: drama"]] * 30,
    }
    for name, columns in (("users", users), ("items", items)):
        store.start(name)
        store.write(name, pa.table(columns))
        store.finish(Manifest(name, "", len(columns["raw_id"])))
    return ["demo", f"run.root={tmp_path}", "run.name=mine", "llm.max_model_len=256"]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = show_prompt.main(list(arguments))
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out


def test_the_first_training_user_as_the_llm_sees_it(
    run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, *run, "llm.max_model_len=800")
    assert out.startswith(
        "user b (train), 2 events in the history\n----- prompt, style 'chat'\n<|bos|><|user|>Profile: a nurse"
    )
    assert out.count("Silent Harbor") == 1 and "by genre, era, creator.<|assistant|>\n-----\n" in out
    assert "tokens, room for 752 (" in out
    assert "cut: 0 of 2 events left out, 1 titles shortened to 300 characters\n" in out
    assert "BOS: '<|bos|>' (1) at 0\n" in out and "EOS: '<|end|>' (2) not in the prompt" in out


def test_a_user_by_id_and_what_was_cut(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, *run, "--user", "c")
    assert out.startswith("user c (test), 30 events")
    left_out = int(out.split("cut: ")[1].split()[0])
    assert 0 < left_out < 30 and out.count("Iron Mirror") == 30 - max(left_out, 2)


def test_a_lead_in_and_a_base_llm(run: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = shown(capsys, *run, "prompt.lead_in=Judging by the ratings:")
    assert "<|assistant|>Judging by the ratings:\n-----" in out
    assert "lead-in 'Judging by the ratings:'" in out
    base = shutil.copytree(BUNDLED, tmp_path / "base", ignore=shutil.ignore_patterns("chat_template.jinja"))
    out = shown(capsys, *run, f"llm.path={base}")
    assert "style 'completion'" in out and "This user likes\n-----" in out
    assert "it has no chat template" in shown(capsys, *run, f"llm.path={base}", "prompt.style=chat")


def test_what_an_endpoint_is_sent(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, *run, "llm.source=openai", "openai.model=x", "prompt.system=Be brief.")
    assert "----- system\nBe brief.\n----- user\nProfile: a nurse" in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["run.name=other"], "run first: dpo4rec run demo"),
        (["--user", "nobody"], "has no user 'nobody'"),
        (["llm.source=statistics"], "asks nobody"),
        (["prompt.template=Hello"], "prompt.template holds no {history}"),
        (["prompt.examples=1"], "has 1 training users"),
    ],
)
def test_mistakes_are_one_line(
    run: list[str], capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert show_prompt.main([*run, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
