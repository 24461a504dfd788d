"""Preference pairs for other trainers, and DPO on preference sets from elsewhere.

python jobs/pairs.py export RUN_FOLDER --format trl|nemo|sharegpt --out FILE.jsonl [--round N] [--split train|valid]
python jobs/pairs.py import FILE ... --llm PATH --out RUN_FOLDER [--format auto|trl|nemo|sharegpt] [--heldout SHARE]
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
pair, or one longer than dpo.max_length, are counted by reason and set aside in RUN_FOLDER/pairs-rejected.jsonl, where
`jq -r .line` gives them back.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo4rec_ray.cli import session
from dpo4rec_ray.config import Config, is_fragment, load_config, read_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.preference_files import (
    FORMATS,
    NOT_AN_OBJECT,
    NOT_ONE_TURN,
    BadRow,
    ChatCodec,
    Fields,
    read_row,
    read_rows,
    write_rows,
)
from dpo4rec_ray.store.artifacts import RunDir, Timer, fingerprint_of, write_json
from dpo4rec_ray.store.schemas import SCHEMA_VERSION, SCHEMAS

SPLITS = ("train", "valid")
RECIPE = "import.toml"  # in the run folder: what it was made for
SET_ASIDE = "pairs-rejected.jsonl"
PAIRS_PER_PART = 8192
Pair = dict[str, Any]  # a row of the artifact `pairs`


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="jobs/pairs.py", description="Export and import preference pairs.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write the pairs of a run for another trainer")
    out.add_argument("run", metavar="RUN_FOLDER")
    out.add_argument("--format", required=True, choices=FORMATS)
    out.add_argument("--out", required=True, metavar="FILE.jsonl")
    out.add_argument("--round", type=int, default=None, metavar="N", help="where the run has several")
    out.add_argument("--split", choices=SPLITS, default="train")
    into = commands.add_parser("import", help="run DPO on a preference set")
    into.add_argument("files", nargs="+", metavar="FILE | FRAGMENT.toml | section.key=value")
    into.add_argument("--llm", required=True, metavar="PATH", help="model folder or hub name")
    into.add_argument("--out", required=True, metavar="RUN_FOLDER")
    into.add_argument("--format", choices=("auto", *FORMATS), default="auto")
    into.add_argument(
        "--heldout", type=_share, default=0.1, metavar="SHARE", help="of the rows that name no split, [0, 1)"
    )
    for command in (out, into):
        command.add_argument("--verbose", action="store_true", help="show all logs, and tracebacks")
    options, more = parser.parse_known_args(arguments)  # overrides may stand behind the options
    if more and (options.command == "export" or any(text.startswith("-") for text in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        options.files += more
    call = export_pairs if options.command == "export" else import_pairs
    return session.guarded(lambda: call(options), options.verbose)


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: not a share from 0 up to, but not including, 1")


def export_pairs(options: argparse.Namespace) -> int:
    """Write one split of a round's pairs as JSON lines; the file appears when it is complete."""
    os.environ.update({key: value for key, value in session.QUIET_ENV.items() if key not in os.environ})
    from dpo4rec_ray.store.policies import base_llm_path
    from dpo4rec_ray.store.progress import say

    store, target = RunDir(options.run), Path(options.out)
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"--out {target}: cannot be written; name a file in a folder that is there")
    config = read_config(store.root)
    round_id = _round(store, options.round)
    codec = _codec(base_llm_path(config, store))
    counts = Counter[str]()
    temporary = target.with_name(f"{target.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as lines:
            for row in _exported(store, round_id, options.split, codec, options.format, counts):
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not counts["lines"]:
            raise UserError(
                f"{store.path('pairs', round_id)}: no {options.split} pair can be written; {counts['left out']} {NOT_ONE_TURN}"
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    say(
        f"export: {counts['lines']} lines of {counts['pairs']} pairs, left out {counts['left out'] or 'none'}, {target}"
    )
    if counts["left out"]:
        say(f"  left out: {NOT_ONE_TURN}")
    say(
        f"  {counts['otherwise']} lines hold a text that would be tokenised otherwise than it was sampled, or was cut at "
        "generate.max_new_tokens; their token ids are as sampled"
    )
    return 0


def _exported(
    store: RunDir, round_id: int, split: str, codec: ChatCodec, form: str, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The lines of every pair; counts: of lines, pairs, pairs left out, and lines that texts do not give back."""
    for file in store.files("pairs", round_id):
        with pq.ParquetFile(file) as parquet:
            batches = parquet.iter_batches(batch_size=256)
            for pair in itertools.chain.from_iterable(batch.to_pylist() for batch in batches):
                if pair["split"] != split:
                    continue
                if not pair["prompt_token_ids"]:
                    raise UserError(
                        f'{file}: these pairs hold no token ids; only texts of llm.source = "vllm" have them'
                    )
                try:
                    rows = list(write_rows(pair, codec, form))
                except BadRow:
                    counts["left out"] += 1
                    continue
                counts["pairs"] += 1
                for row, same in rows:
                    counts["lines"] += 1
                    counts["otherwise"] += not same
                    yield row


def _round(store: RunDir, wanted: int | None) -> int:
    """The round to export: the one that is asked for, or the only one."""
    rounds = sorted(
        int(file.parent.parent.name) for file in store.root.glob("rounds/[0-9]*/pairs/manifest.json")
    )
    if wanted is None and len(rounds) > 1:
        raise UserError(
            f"{store.root} has pairs of the rounds {', '.join(map(str, rounds))}; choose one with --round"
        )
    round_id = wanted if wanted is not None else (rounds or [1])[0]
    if store.require("pairs", round_id).schema_version != SCHEMA_VERSION:
        raise UserError(f"{store.path('pairs', round_id)}: written by another version; run the recipe again")
    return round_id


def import_pairs(options: argparse.Namespace) -> int:
    """Make the run folder and its pairs, then run the dpo stage; what is complete is kept."""
    folder = Path(options.out)
    changes = [text for text in options.files if is_fragment(text) or re.match(r"\w+\.[\w.]+=", text)]
    files = [Path(text).expanduser() for text in options.files if text not in changes]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
    if not files:
        raise UserError("no file to import; name one or more .jsonl or .parquet files before the options")
    config = _import_config(options.llm, folder, changes)
    os.environ.update({key: value for key, value in session.WORK_ENV.items() if key not in os.environ})
    if not options.verbose:
        session.be_quiet(folder / "driver.log")
    from dpo4rec_ray import checks
    from dpo4rec_ray.pipeline import Runner, Selection
    from dpo4rec_ray.store import memory
    from dpo4rec_ray.store.progress import say

    checks.check_all(config, "dpo")
    with session.locked(folder):
        memory.watch_memory()
        store = RunDir(folder)
        write_json(folder / "config.json", config.model_dump(mode="json"))
        _import(config, store, files, options.format, options.heldout)
        session.start_ray(options.verbose)
        Runner(config, store, Selection()).step("dpo", 1)
    say(f"policy: {store.path('policy', 1)}")
    return 0


def _import_config(llm: str, folder: Path, changes: list[str]) -> Config:
    """The configuration of a run that has an LLM and pairs, and nothing before them."""
    if llm == "bootstrap":
        raise UserError(
            "--llm bootstrap: there is no catalogue to train on; name a model folder or a hub name"
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECIPE).is_file():
        raise UserError(f"--out {folder}: holds something else than an import; name a new folder")
    local = Path(llm).expanduser()
    path = str(local.resolve()) if llm != "bundled" and local.exists() else llm
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out {folder}: a file is in its place; name a folder") from None
    values = {"run": {"root": str(folder.parent), "name": folder.name}, "llm": {"path": path}}
    text = "# written by jobs/pairs.py import\n"
    for section, keys in values.items():
        lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in keys.items())
        text += f"[{section}]\n" + "".join(lines)
    (folder / RECIPE).write_text(text, encoding="utf-8")
    config = load_config(folder / RECIPE, changes)
    for section, keys in values.items():
        for key, value in keys.items():
            if getattr(getattr(config, section), key) != value:
                raise UserError(f"{section}.{key} is set by --llm and --out; leave it out of the changes")
    return config


def _import(config: Config, store: RunDir, files: list[Path], form: str, heldout: float) -> None:
    """Write `pairs` of round 1, unless they are there and made from the same."""
    from dpo4rec_ray import identity
    from dpo4rec_ray.core.keys import seed_of
    from dpo4rec_ray.datasets.files import absolute, file_identity
    from dpo4rec_ray.knowledge.text_table import Tally
    from dpo4rec_ray.store.outcome import Outcome
    from dpo4rec_ray.store.policies import base_llm_path
    from dpo4rec_ray.store.progress import Progress, say

    max_length = config.dpo.max_length or config.llm.max_model_len
    llm = identity.base_llm_identity(config, store)
    identities = [file_identity(absolute(str(file))) for file in files]
    fingerprint = fingerprint_of(
        "import", form, str(heldout), str(max_length), str(config.run.seed), llm, *identities
    )
    kept = store.manifest("pairs", 1)
    if kept is not None and kept.fingerprint == fingerprint:
        say(f"import(1): kept, {kept.rows} rows, {store.path('pairs', 1)}")
        return
    timer = Timer()
    say("import(1): started")
    store.start("pairs", 1)
    codec = _codec(base_llm_path(config, store))
    counts, tally = Counter[str](), Tally()

    def split_of(row: int) -> str:
        return "valid" if seed_of(config.run.seed, "heldout", row) < heldout * 2**31 else "train"

    with (
        open(store.root / SET_ASIDE, "w", encoding="utf-8", errors="backslashreplace") as rejected,
        Progress("import", 0, "rows") as progress,
    ):

        def set_aside(reason: str, where: str, line: str) -> None:
            tally.leave_out(reason, where)
            entry = {"where": where, "reason": reason, "line": line}
            rejected.write(json.dumps(entry, ensure_ascii=False) + "\n")

        def rows() -> Iterator[tuple[str, Fields | None, bytes]]:
            for row in itertools.chain.from_iterable(map(read_rows, files)):
                yield row
                counts["rows"] += 1
                progress.at(counts["rows"])

        pairs = _joined(_read_pairs(rows(), form, codec, max_length, split_of, set_aside))
        for part in itertools.count():
            own = list(itertools.islice(pairs, PAIRS_PER_PART))
            if not own:
                break
            for pair in own:
                counts[pair["split"]] += 1
                counts["tokenized"] += pair["tokenized"]
            store.write("pairs", pa.Table.from_pylist(own, schema=SCHEMAS["pairs"]), 1, part)
    if not counts["train"]:
        raise UserError(
            f"{', '.join(map(str, files))}: no pair to train on; set aside: {tally.words or 'none'}"
        )
    stats = {
        "pairs": counts["train"],
        "heldout_pairs": counts["valid"],
        "tokenized": counts["tokenized"],
        "dropped": dict(tally.left_out),
    }
    outcome = Outcome(rows_in=counts["rows"], rows_out=counts["train"] + counts["valid"], stats=stats)
    store.finish(outcome.manifest("pairs", fingerprint, timer.seconds, {}, config.run.seed), 1)
    say(
        f"import(1): {counts['train']} training pairs, {counts['valid']} held out, {counts['tokenized']} tokenised, "
        f"the others by their stored token ids, {timer.seconds:.1f} s, {store.path('pairs', 1)}"
    )
    if tally.left_out:
        say(f"  set aside in {store.root / SET_ASIDE}: {tally.words}")


def _read_pairs(
    rows: Iterator[tuple[str, Fields | None, bytes]],
    form: str,
    codec: ChatCodec,
    max_length: int,
    split_of: Callable[[int], str],
    set_aside: Callable[[str, str, str], None],
) -> Iterator[Pair]:
    """One pair of every row that gives one. split_of: of a row that names none, by its number over all files."""
    for number, (where, row, line) in enumerate(rows):
        try:
            if row is None:
                raise BadRow(NOT_AN_OBJECT)
            found = read_row(row, form)
            ids = codec.encode(found)
            if len(ids.prompt) + max(map(len, (ids.chosen, *ids.rejected))) > max_length:
                raise BadRow(f"longer than {max_length} tokens")
        except BadRow as error:
            text = line.decode(errors="replace").strip() if line else json.dumps(row, default=str)
            set_aside(str(error), where, text)
            continue
        own = found.stored
        yield {
            "round": 1,
            "user_id": number if own is None or own.user_id is None else own.user_id,
            "split": split_of(number) if own is None or own.split is None else own.split,
            # a part's worth of Python's integers would take gigabytes
            "prompt_token_ids": np.asarray(ids.prompt, np.int32),
            "chosen_token_ids": np.asarray(ids.chosen, np.int32),
            "rejected_token_ids": [np.asarray(one, np.int32) for one in ids.rejected],
            "chosen_reward": found.chosen_reward,
            "rejected_reward": found.rejected_reward,
            "tokenized": ids.tokenized,
        }


def _joined(pairs: Iterator[Pair]) -> Iterator[Pair]:
    """Consecutive lines of one exported pair, one per rejected text, as one pair again."""
    last: Pair | None = None
    for pair in pairs:
        if last is not None and _is_next(last, pair):
            last["rejected_token_ids"] += pair["rejected_token_ids"]
            last["rejected_reward"] += pair["rejected_reward"]
            continue
        if last is not None:
            yield last
        last = pair
    if last is not None:
        yield last


def _is_next(pair: Pair, line: Pair) -> bool:
    """Whether a line is the next rejected text of the same exported pair. Rows from elsewhere have each a user of its own."""
    names = ("prompt_token_ids", "chosen_token_ids")
    return (
        pair["user_id"] == line["user_id"]
        and all(np.array_equal(pair[name], line[name]) for name in names)
        and not any(np.array_equal(one, line["rejected_token_ids"][0]) for one in pair["rejected_token_ids"])
    )


def _codec(llm: str) -> ChatCodec:
    """Texts and token ids of an LLM, its prompts made by the function that makes those of a run."""
    from dpo4rec_ray.knowledge.prompts import _TEMPLATE_SWITCHES, control_tokens, encode_chat
    from dpo4rec_ray.policy.model import load_tokenizer

    tokenizer = load_tokenizer(llm)
    encode_user = functools.partial(encode_chat, tokenizer)
    return ChatCodec(tokenizer, encode_user, control_tokens(tokenizer), _TEMPLATE_SWITCHES)
