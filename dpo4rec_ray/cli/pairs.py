"""Preference pairs for other trainers, and DPO on preference sets from elsewhere.

dpo4rec pairs export RUN_FOLDER --format trl|nemo|sharegpt --out FILE.jsonl [--round N] [--split train|valid]
dpo4rec pairs import FILE ... --llm PATH --out RUN_FOLDER [--format auto|trl|nemo|sharegpt] [--heldout SHARE]
                     [FRAGMENT.toml | section.key=value ...]

export writes one line per chosen and rejected text. The texts are decoded from the stored token ids, and those are kept beside
them, so that an import of an export is exact; the last line printed counts texts that would be tokenised otherwise. What reads
the file:
    trl: `DPOTrainer(train_dataset=load_dataset("json", data_files=FILE, split="train"))`. With a chat template the
        texts are messages, and `chat_template_kwargs` holds its arguments; without, they are plain.
    nemo: NeMo-RL's PreferenceDataset (`context`, `completions` by `rank`).
    sharegpt: LLaMA-Factory, in dataset_info.json `"pairs": {"file_name": FILE, "formatting": "sharegpt", "ranking": true,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}}`.

import reads JSON lines or Parquet in these layouts, writes the pairs of round 1 of a new run folder, and runs DPO on
them; the same command goes on where it stopped. A plain prompt is one user turn. Texts go through the LLM's chat
template; the token ids of an exported line are used when they belong to its texts under this LLM. Rows that give no
pair, or one longer than policy.max_length, are counted by reason and set aside in RUN_FOLDER/pairs-rejected.jsonl, where
`jq -r .line` gives them back.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import Formatter, examples
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.exchange import FORMATS
from dpo4rec_ray.storage.local_copies import local_copy
from dpo4rec_ray.storage.places import Place, place, write_text

if TYPE_CHECKING:
    from dpo4rec_ray.config import Config

SPLITS = ("train", "valid")
RECIPE = "import.toml"  # in the run folder: what it was made for


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec pairs",
        description="Export and import preference pairs.",
        epilog=examples(
            ("dpo4rec pairs export runs/demo --format trl --out pairs.jsonl", "for another trainer"),
            ("dpo4rec pairs import pairs.jsonl --llm MODEL --out runs/mine", "DPO on pairs from elsewhere"),
        ),
        formatter_class=Formatter,
    )
    commands = found.add_subparsers(dest="command", required=True)
    text = "write the pairs of a run for another trainer"
    out = commands.add_parser("export", help=text, description=text)
    out.add_argument("run", metavar="RUN_FOLDER")
    out.add_argument("--format", required=True, choices=FORMATS)
    out.add_argument("--out", required=True, metavar="FILE.jsonl")
    out.add_argument(
        "--round", type=int, default=None, metavar="N", help="where the run has several rounds (or turns)"
    )
    out.add_argument("--split", choices=SPLITS, default="train")
    text = "run DPO on a preference set"
    into = commands.add_parser("import", help=text, description=text)
    into.add_argument("files", nargs="+", metavar="FILE | FRAGMENT.toml | section.key=value")
    into.add_argument("--llm", required=True, metavar="PATH", help="model folder or hub name")
    into.add_argument("--out", required=True, metavar="RUN_FOLDER")
    into.add_argument("--format", choices=("auto", *FORMATS), default="auto")
    into.add_argument(
        "--heldout", type=_share, default=0.1, metavar="SHARE", help="of the rows that name no split, [0, 1)"
    )
    for command in (out, into):
        command.add_argument("--verbose", action="store_true", help="show all logs, and tracebacks")
    return found


def main(arguments: list[str] | None = None) -> int:
    whole = parser()
    options, more = whole.parse_known_args(arguments)  # overrides may stand behind the options
    if more and (options.command == "export" or any(text.startswith("-") for text in more)):
        whole.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        options.files += more
    call = export_command if options.command == "export" else import_command
    return session.guarded(lambda: call(options), options.verbose)


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: not a share from 0 up to, but not including, 1")


def export_command(options: argparse.Namespace) -> int:
    """Write one split of a round's pairs."""
    os.environ.update({key: value for key, value in session.QUIET_ENV.items() if key not in os.environ})
    from dpo4rec_ray.config import read_config
    from dpo4rec_ray.exchange.chat_codec import ChatCodec
    from dpo4rec_ray.exchange.exporting import export_pairs, round_with_pairs
    from dpo4rec_ray.policy.model import load_tokenizer
    from dpo4rec_ray.store.artifacts import RunDir
    from dpo4rec_ray.store.policies import base_llm_path

    store, target = RunDir(options.run), Path(options.out)
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"--out {target}: cannot be written; name a file in a folder that is there")
    config = read_config(options.run) if (store.root / "config.json").is_file() else None
    if config and "dpo" not in config.policy.objectives:
        raise UserError(
            f"{options.run}: its policy.objective is {config.policy.objective!r}; only DPO makes pairs"
        )
    session.check_came_to("pairs", config.policy.objectives.index("dpo") + 1 if config else 1, options.run)
    config = config or read_config(options.run)
    round_id = round_with_pairs(store, options.round)
    codec = ChatCodec(load_tokenizer(base_llm_path(config, store)))
    export_pairs(store, round_id, options.split, codec, options.format, target)
    return 0


def import_command(options: argparse.Namespace) -> int:
    """Make the run folder and its pairs, then run the dpo stage; what is complete is kept."""
    from dpo4rec_ray.config import is_fragment

    folder = place(options.out)
    changes = [text for text in options.files if is_fragment(text) or re.match(r"\w+\.[\w.]+=", text)]
    files = [Path(text).expanduser() for text in options.files if text not in changes]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
    if not files:
        raise UserError("no file to import; name one or more .jsonl or .parquet files before the options")
    config = _import_config(options.llm, folder, changes)
    folder = session.open_run(config, options.verbose)
    from dpo4rec_ray import checks
    from dpo4rec_ray.exchange.importing import import_pairs
    from dpo4rec_ray.running import Runner, Selection
    from dpo4rec_ray.store import memory
    from dpo4rec_ray.store.artifacts import RunDir, write_json
    from dpo4rec_ray.store.progress import say

    if config.policy.objectives != ("dpo",):
        raise UserError(
            f"policy.objective = {config.policy.objective!r}: pairs are trained on by DPO alone; leave it out"
        )
    checks.check_all(config, "dpo")
    with session.locked(folder):
        memory.watch_memory()
        store = RunDir(folder)
        write_json(folder / "config.json", config.model_dump(mode="json"))
        import_pairs(config, store, files, options.format, options.heldout)
        session.join(folder, options.verbose)
        Runner(config, store, Selection()).step("dpo", 1)
    say(f"policy: {store.path('policy', 1)}")
    return 0


def _import_config(llm: str, folder: Place, changes: list[str]) -> Config:
    """The configuration of a run that begins with an LLM and pairs."""
    import tomli_w

    from dpo4rec_ray.config import load_config

    if llm == "bootstrap":
        raise UserError(
            "--llm bootstrap: there is no catalogue to train on; name a model folder or a hub name"
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECIPE).is_file():
        raise UserError(f"--out {folder}: holds files that are not an import; name a new folder")
    local = Path(llm).expanduser()
    path = str(local.resolve()) if llm != "bundled" and local.exists() else llm
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out {folder}: a file is in its place; name a folder") from None
    values = {"run": {"root": str(folder.parent), "name": folder.name}, "llm": {"path": path}}
    text = "# written by `dpo4rec pairs import`\n" + tomli_w.dumps(values)
    write_text(folder / RECIPE, text)
    config = load_config(local_copy(folder / RECIPE), changes)
    for section, keys in values.items():
        for key, value in keys.items():
            if getattr(getattr(config, section), key) != value:
                raise UserError(f"{section}.{key} is set by --llm and --out; leave it out of the changes")
    return config
