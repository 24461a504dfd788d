"""The files of a published version. Many processes map the same files into memory.

A version is a folder. Its version.json is written last: where it is, the version is complete. What a version knows of its
millions of users stays on disk: a request reads the pages of its own user, and the replicas of a node share these pages.
Items are in memory. All files are plain NumPy arrays, Arrow, safetensors or JSON, so reading one cannot run code.

A user's knowledge vector is stored as what the reranker makes of it, computed once (rerankers/scorer.py): `user_sides.npy`
is the user part of the input layer, `user_standard.npy` the vector scaled for the similarity.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpo4rec_ray.config.texts import EncoderSection
from dpo4rec_ray.core.keys import Keys, string_key
from dpo4rec_ray.errors import UserError, first_line
from dpo4rec_ray.storage.local_copies import local_copy
from dpo4rec_ray.storage.places import Place, place
from dpo4rec_ray.store.artifacts import write_json

VERSION_FILE = "version.json"
RECORDED_FILE = "recorded.json"
ENCODER_FILE = "encoder.json"  # settings of the text encoder, if the version reads texts
FORMAT = 1  # grows when the files change their meaning
# Where the run has an LLM, this folder has what writes texts for unknown users (serving/writer.py): config.json, and the
# weights that were in the run folder.
WRITER_FOLDER, WRITER_LLM, WRITER_LORA = "writer", "llm", "lora"
WRITER_EXAMPLES = "examples.json"  # in the writer's folder; only where prompts show examples
FORMER_NAMES = {"figures": "metrics", "max_history": "reranker_history"}  # in version.json
UNKNOWN = -1  # the row of an id that the version does not know

# Rows of users.arrow and items.arrow are in the order of the run's integer ids. texts.arrow, user_sides.npy and
# user_standard.npy have one order, to which user_vector_rows.npy leads.
USERS = pa.schema(
    [
        ("raw_id", pa.string()),
        ("history_item_ids", pa.list_(pa.int64())),
        ("history_ratings", pa.list_(pa.float32())),
    ]
)
ITEMS = pa.schema([("raw_id", pa.string()), ("title", pa.string()), ("attributes", pa.list_(pa.string()))])
TEXTS = pa.schema([("text", pa.string())])


@dataclass(frozen=True)
class VersionCard:
    """version.json: what a version is and where it comes from.

    Attributes:
        model: backbone, system and seed, as in the evaluation's tables.
        knowledge: the system whose texts the reranker reads; "" if it reads none.
        source: fingerprint of the evaluation that the version was published from.
        reranker_history: most events of a user that the reranker reads.
        metrics: of the model on the run's test lists.
    """

    version: str
    model: str
    knowledge: str
    run: str
    source: str
    created: str
    num_users: int
    num_items: int
    reranker_history: int
    encoder: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT


def write_card(folder: Path, card: VersionCard) -> None:
    """Write the last file of a version."""
    write_json(folder / VERSION_FILE, asdict(card))


def read_card(folder: Place) -> VersionCard:
    """Raises UserError if the folder has no complete version, or one of another format."""
    file = folder / VERSION_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        card = VersionCard(**{FORMER_NAMES.get(name, name): value for name, value in content.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: no published version ({error}); publish the run again") from None
    if card.format != FORMAT:
        raise UserError(f"{file}: format {card.format}, but this code reads {FORMAT}; publish the run again")
    return card


class KeyIndex:
    """Raw ids -> rows, by 64-bit keys (core/keys.py) in two mapped arrays. The ids themselves are not read."""

    def __init__(self, folder: Path, name: str):
        """Raises UserError if a file is missing or damaged."""
        # Views without the class numpy.memmap, whose indexing costs several times as much. The files stay mapped.
        self._keys = mapped(folder / f"{name}_keys.npy").view(np.ndarray)
        self._rows = mapped(folder / f"{name}_rows.npy").view(np.ndarray)
        if len(self._keys) != len(self._rows):
            raise UserError(f"{folder}: {name}_keys.npy and {name}_rows.npy differ in length; publish again")

    @staticmethod
    def write(folder: Path, name: str, keys: Keys) -> None:
        """keys: [n] of the rows 0 to n - 1."""
        order = np.argsort(keys, kind="stable")
        np.save(folder / f"{name}_keys.npy", keys[order])
        np.save(folder / f"{name}_rows.npy", order.astype(np.int64))

    def row(self, raw_id: str) -> int:
        """The row of an id, or UNKNOWN."""
        key = np.uint64(string_key(raw_id.encode()))
        place = int(self._keys.searchsorted(key))
        found = place < len(self._keys) and self._keys[place] == key
        return int(self._rows[place]) if found else UNKNOWN


class VersionFiles:
    """The mapped files of a version. Threads may share it: nothing is written."""

    def __init__(self, folder: str | Path):
        """Raises UserError if a file is missing or damaged, or does not fit the others."""
        self.card = read_card(place(folder))
        self.folder = local_copy(folder)
        self.user_index = KeyIndex(self.folder, "user")
        self.items = table(self.folder / "items.arrow")
        self.item_rows = {raw: row for row, raw in enumerate(self.items["raw_id"].to_pylist())}
        self._users = table(self.folder / "users.arrow")
        if self.card.knowledge:
            self._standard = mapped(self.folder / "user_standard.npy").view(np.ndarray)
            self._sides = mapped(self.folder / "user_sides.npy").view(np.ndarray)
            self._vector_rows = mapped(self.folder / "user_vector_rows.npy").view(np.ndarray)
            self._texts = table(self.folder / "texts.arrow")
            fits = len(self._texts) == len(self._standard) == len(self._sides)
            if not fits or len(self._vector_rows) != len(self._users):
                raise UserError(f"{self.folder}: vectors, texts and users do not fit; publish the run again")

    @cached_property
    def item_vectors(self) -> np.ndarray | None:
        """[num_items, D] float32; None without knowledge."""
        return np.load(self.folder / "item_vectors.npy", allow_pickle=False) if self.card.knowledge else None

    @cached_property
    def ids_of_titles(self) -> dict[str, str]:
        """Title -> raw id of the first item that has it."""
        titles, ids = (self.items[name].to_pylist()[::-1] for name in ("title", "raw_id"))
        return dict(zip(titles, ids, strict=True))

    @cached_property
    def encoder(self) -> EncoderSection:
        """How texts are encoded.

        Raises:
            UserError: the version reads no texts, or does not say how they are encoded.
        """
        name, file = self.card.version, self.folder / ENCODER_FILE
        if not self.card.knowledge:
            raise UserError(
                f'version {name} reads no texts, so its users cannot be asked for by text; set serving.query = "user" '
                "or promote a version that reads texts"
            )
        if not file.is_file():
            raise UserError(
                f"version {name} has no {ENCODER_FILE}, which older versions lack; publish its run again"
            )
        try:
            return EncoderSection.model_validate_json(file.read_bytes())
        except (OSError, ValueError) as error:  # of a damaged file, or of one that other code wrote
            raise UserError(f"{file}: cannot be read ({first_line(error)}); publish the run again") from None

    @cached_property
    def recorded(self) -> list[dict[str, Any]]:
        """Requests with the scores that the evaluation gave: "user_id", "history", "candidates", "scores"."""
        return json.loads((self.folder / RECORDED_FILE).read_text(encoding="utf-8"))

    @property
    def vector_dim(self) -> int:
        """D of the knowledge vectors; 0 without knowledge."""
        return self._standard.shape[1] if self.card.knowledge else 0

    def user_parts(self, rows: npt.NDArray[np.int64]) -> tuple[np.ndarray, np.ndarray, npt.NDArray[np.bool_]]:
        """Copies of what is stored of n users.

        Args:
            rows: [n], UNKNOWN allowed.

        Returns:
            standard [n, D], sides [n, W], and which users have knowledge [n]; the values of the others mean nothing.
        """
        stored = self._vector_rows[rows]  # UNKNOWN, -1, takes the last row
        there = (rows != UNKNOWN) & (stored != UNKNOWN)
        return self._standard[stored], self._sides[stored], there

    def text(self, row: int) -> str:
        """The knowledge text of a user; "" if there is none."""
        place = int(self._vector_rows[row]) if self.card.knowledge else UNKNOWN
        return "" if place == UNKNOWN else self._texts["text"][place].as_py()

    def history(self, row: int) -> tuple[list[int], list[float]]:
        """Item rows and ratings of a user, oldest first."""
        return self._users["history_item_ids"][row].as_py(), self._users["history_ratings"][row].as_py()

    def user_id(self, row: int) -> str:
        return self._users["raw_id"][row].as_py()

    def item_id(self, row: int) -> str:
        return self.items["raw_id"][row].as_py()

    def title(self, row: int) -> str:
        return self.items["title"][row].as_py()


def mapped(file: Path) -> np.ndarray:
    """A .npy file, mapped for reading. It is never unpickled.

    Raises:
        UserError: the file is missing, cut off, or no plain array.
    """
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: {error}; publish the run again") from None


def table(file: Path) -> pa.Table:
    """An Arrow file, mapped.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{file}: {error}; publish the run again") from None


def arrow_writer(file: Path, schema: pa.Schema) -> Any:
    """Writes record batches into a file that `table` maps."""
    return pa.ipc.new_file(str(file), schema)
