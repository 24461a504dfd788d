"""Texts without a model or an endpoint: counted from histories, filled-in sentences, or read from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from dpo4rec_ray.config import Config
from dpo4rec_ray.datasets.files import absolute, file_identity
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.completions import Answer, Completion
from dpo4rec_ray.knowledge.statistics import STATISTICS_VERSION, StatisticsGenerator
from dpo4rec_ray.knowledge.text_table import KLG, TextTable, check_text_file, place_texts
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.texts.text_source import Row, TextWriter, WriterPlacement, catalogue

TEMPLATE_VERSION = 1
MOODS = ("quiet", "fast", "dark", "warm", "strange", "classic", "recent", "light")


class StatisticsTexts(TextWriter):
    """Texts counted from the histories."""

    @classmethod
    def identity(cls, config: Config, store: RunDir) -> str:
        return f"statistics {STATISTICS_VERSION}"

    def __init__(self, config: Config, store: RunDir):
        items = catalogue(store)
        self._generator = StatisticsGenerator(
            items["title"].to_pylist(),
            items["attributes"].to_pylist(),
            config.like_at,
        )

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Answer]:
        items, ratings = ([row[name] for row in rows] for name in ("history_item_ids", "history_ratings"))
        return self._generator.generate(items, ratings, seeds, counts)


class TemplateTexts(TextWriter):
    """Filled-in sentences, for tests and for simulating scale: they do not depend on any taste. The same for the same seed."""

    @classmethod
    def identity(cls, config: Config, store: RunDir) -> str:
        return f"template {TEMPLATE_VERSION}"

    def __init__(self, config: Config, store: RunDir):
        pass

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Answer]:
        answers = []
        for row, seed, count in zip(rows, seeds, counts, strict=True):
            last = row["history_item_ids"][-1] if len(row["history_item_ids"]) else 0
            texts = (
                f"Simulated: {MOODS[(seed + i) % 8]} things like item {last}, take {i}." for i in range(count)
            )
            answers.append(Answer([Completion([], text, "stop") for text in texts]))
        return answers


class TableTexts(TextWriter):
    """Texts from a file."""

    section = "texts"

    @classmethod
    def identity(cls, config: Config, store: RunDir) -> str:
        files = [file_identity(absolute(path)) for path in (config.texts.users, config.texts.items) if path]
        return f"table {hashlib.sha256(chr(10).join(files).encode()).hexdigest()[:16]}"

    @classmethod
    def check(cls, config: Config) -> None:
        """The files of texts and their columns."""
        section = config.texts
        if not section.users:
            raise UserError(
                'texts.users is not set; with llm.source = "table" it names the file of the users\' texts'
            )
        check_text_file("texts.users", section.users, section.user, section.text)
        if section.users.endswith(KLG) and config.run.max_rounds:
            raise UserError(
                f"texts.users {section.users} holds one text per user, and a round compares generate.num_samples of them; "
                "set run.num_rounds = 0, or give a .parquet or .jsonl with several rows per user"
            )
        if section.items:
            check_text_file("texts.items", section.items, section.item, section.text)
        elif config.prompt.describe_items:
            raise UserError(
                "prompt.describe_items = true, but texts.items names no file with the items' texts"
            )

    @classmethod
    def placement(cls, config: Config, store: RunDir, policy_round: int) -> WriterPlacement:
        """Writes the files' texts into the run folder, where actors on any machine find them; says what was left out."""
        section, folder = config.texts, store.root / "texts"
        files: dict[str, Place] = {}
        for subject, path, column in (
            ("user", section.users, section.user),
            ("item", section.items, section.item),
        ):
            if not path:
                continue
            known = store.read(f"{subject}s", columns=[f"{subject}_id", "raw_id"])
            columns = (column, section.text)
            made_from = (file_identity(absolute(path)), *columns, store.require(f"{subject}s").produced)
            files[f"{subject}s"] = folder / f"{subject}s.arrow"
            counts = place_texts(
                path,
                columns,
                known["raw_id"].combine_chunks(),
                known[f"{subject}_id"].to_numpy(),
                files[f"{subject}s"],
                "\n".join(made_from),
            )
            if counts is not None and counts.left_out:
                say(f"  texts.{subject}s {path}: {counts.texts} texts, left out: {counts.words}")
        return WriterPlacement(cls, {"files": files})

    def __init__(self, config: Config, store: RunDir, *, files: dict[str, Place]):
        """files: "users", "items" -> where their texts are."""
        self._tables = {subject: TextTable(file) for subject, file in files.items()}

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Answer]:
        return self._texts("users", [row["user_id"] for row in rows], counts)

    def items(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Answer]:
        return self._texts("items", [row["item_id"] for row in rows], counts)

    def _texts(self, subject: str, ids: Sequence[int], counts: Sequence[int]) -> list[Answer]:
        found = []
        for subject_id, count in zip(ids, counts, strict=True):
            samples = [Completion([], text, "stop") for text in self._tables[subject].of(subject_id, count)]
            detail = f"{len(samples)} of {count} texts" if 0 < len(samples) < count else ""
            found.append(Answer(samples, "" if samples else "no_text", detail))
        return found
