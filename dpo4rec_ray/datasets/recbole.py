"""RecBole's atomic files as they are (https://recbole.io): NAME.inter, and NAME.item and NAME.user if they are there.

Tab-separated, and the header gives every column's type: `user_id:token`, `rating:float`, `title:token_seq`. So nothing has to
be mapped. Interactions without a rating are implicit feedback, those without a timestamp are in the order of the file.
Other files, such as NAME.kg and NAME.link, are not read.
"""

from __future__ import annotations

from dpo4rec_ray.config.data import TableSection, TimestampUnit
from dpo4rec_ray.core.candidates import SPLITS
from dpo4rec_ray.datasets import table
from dpo4rec_ray.datasets.files import list_files, read_header
from dpo4rec_ray.datasets.source import Source
from dpo4rec_ray.errors import UserError

USER, ITEM, TIME = "user_id", "item_id", "timestamp"
EVENTS = ".inter"
# In order: the first one that is there.
RATINGS = ("rating", "label")
TITLES = (
    "title",
    "movie_title",
    "item_name",
    "name",
    "product_title",
    "item_title",
    "business_name",
    "track_name",
)
MAX_RATING = 1e9


def describe(raw_dir: str, file: str = "", timestamp_unit: TimestampUnit = "s") -> Source:
    """The dataset in a folder; `file` names its .inter file where the folder holds several datasets. Without it a dataset is read
    from NAME.inter, or else from the parts into which its publisher has split it, NAME.train.inter and so on, in this order.
    Other dots belong to the name.

    Raises:
        UserError: no or several datasets, or a column is not there or has no type.
    """
    paths = {one.name: one.path for one in list_files(raw_dir)}
    names = [name for name in paths if name.endswith(EVENTS)]
    chosen = [name for name in names if name == file] if file else names
    datasets = {_dataset(name) for name in chosen}
    if len(datasets) != 1:
        what = "several datasets; set data.file to the .inter file of one" if datasets else "no .inter file"
        raise UserError(
            f"{raw_dir}: {what}{f' named {file!r} (data.file)' if file and not datasets else ''}; found: "
            f"{', '.join(list(paths)[:20]) or 'nothing'}"
        )
    (dataset,) = datasets
    if not file:
        # A whole file holds what its parts hold: with both, every event would be read twice.
        whole = [name for name in chosen if name == dataset + EVENTS]
        chosen = whole or [name for part in SPLITS if (name := f"{dataset}.{part}{EVENTS}") in chosen]
    events = _columns(paths[chosen[0]])
    if USER not in events or ITEM not in events:
        raise UserError(
            f"{paths[chosen[0]]}: no column {USER if USER not in events else ITEM} (found: {', '.join(events)}); rename it, or "
            'map the columns with data.dataset = "table"'
        )
    rating = next((name for name in RATINGS if name in events), "")
    section = {
        "delimiter": "\t",
        "interactions": chosen[0],
        "user": events[USER],
        "item": events[ITEM],
        "rating": events.get(rating, ""),
        "timestamp": events.get(TIME, ""),
        # Datasets differ in their scales, and none says its own.
        "min_rating": -MAX_RATING,
        "max_rating": MAX_RATING,
        "timestamp_unit": timestamp_unit,
    }
    if (name := f"{dataset}.item") in paths:
        section |= _items(name, _columns(paths[name]))
    if (name := f"{dataset}.user") in paths:
        users = _columns(paths[name])
        section |= {"users": name, "user_id": users.get(USER, USER)}
        section["profile"] = tuple(
            typed for plain, typed in users.items() if plain != USER and _is_text(typed)
        )
    return table.describe(raw_dir, TableSection.model_validate(section), typed=True, parts=tuple(chosen))


def _dataset(name: str) -> str:
    """The dataset of an .inter file: its name without the ending and without the part that it holds."""
    stem = name.removesuffix(EVENTS)
    dataset, _, part = stem.rpartition(".")
    return dataset if dataset and part in SPLITS else stem


def _items(file: str, columns: dict[str, str]) -> dict[str, object]:
    title = next((name for name in TITLES if name in columns), "")
    texts = {name: typed for name, typed in columns.items() if name not in (ITEM, title) and _is_text(typed)}
    return {
        "items": file,
        "item_id": columns.get(ITEM, ITEM),
        "title": columns.get(title, ""),
        "attributes": texts,
    }


def _is_text(typed: str) -> bool:
    return typed.endswith((":token", table.SEQUENCE))


def _columns(path: str) -> dict[str, str]:
    """Name -> "name:type" of a file's columns, in order.

    Raises:
        UserError: a column has no type.
    """
    found = read_header(path).decode("utf-8", "replace").split("\t")
    untyped = [name for name in found if ":" not in name]
    if untyped:
        raise UserError(
            f"{path}: the column {untyped[0]!r} has no type, as in user_id:token; RecBole's files are tab-separated "
            "and every column of the header has one"
        )
    return {name.partition(":")[0].strip(): name.strip() for name in found}
