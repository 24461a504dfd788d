"""Where the data comes from, how it is split, and how candidate lists are made."""

from __future__ import annotations

import codecs
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dpo4rec_ray.config.placed import Placed
from dpo4rec_ray.config.section import Folder, Section

_NamedUnit = Literal["s", "ms", "us", "ns", "iso"]


def _known_unit(value: object) -> object:
    if value in get_args(_NamedUnit) or (isinstance(value, str) and "%" in value):
        return value
    named = ", ".join(get_args(_NamedUnit))
    raise ValueError(f'none of {named}, and no format of strptime, such as "%d/%m/%Y %H:%M"')


# A text with % is a format of strptime.
TimestampUnit = Annotated[_NamedUnit | str, BeforeValidator(_known_unit)]
# So few damaged rows stop no run, whatever share of a small file they are.
FEW_BAD_ROWS = 10
MIN_CANDIDATES, MAX_CANDIDATES = 2, 200


class DataSection(Placed):
    """Source, splits and candidate lists (docs/method.md, section 1)."""

    placement = Placed.placement | {"partition_mib"}
    dataset: str = "sample"
    """Name of the data source: sample, movielens, amazon2018, amazon2023, recbole or table."""
    raw_dir: Folder = ""
    """Folder of the raw files: a local path or a URI (s3://, gs://, hf://, http://)."""
    file: str = ""
    """File of the interactions, where the folder holds several candidates. Amazon and RecBole only."""
    protocol: Literal["user", "paper", "time"] = "user"
    """How events are ordered and split. "user": users are split at random, events are ordered to the second. "paper": the same,
    but events are ordered by calendar day (UTC), as in KAR. "time": one cut in time for validation and one for test."""
    repeated_events: Literal["", "keep", "first"] = ""
    """Several events of the same user and item. "keep": all count. "first": the earliest counts, the others are left out.
    "": "keep" with protocol "paper", as in KAR, whose 5-cores count them; else "first"."""
    user_core: int = Field(default=0, ge=0)
    """k-core: least number of events of a user. 0: no limit."""
    item_core: int = Field(default=0, ge=0)
    """k-core: least number of events of an item. Both limits are applied until nothing changes. 0: no limit."""
    max_bad_fraction: float = Field(
        default=0.001,
        ge=0,
        le=1,
        description=f"Largest share of damaged rows; more stop the run if they are more than {FEW_BAD_ROWS} rows. 0: a single "
        "damaged row stops it.",
    )
    max_users: int = Field(default=0, ge=0)
    """Number of users to keep, drawn at random and the same for every seed. 0: all."""
    positive_rating: float = 4.0
    """Least rating of a positive."""
    max_history: int = Field(default=30, ge=1)
    """Most events of the knowledge history, which the prompt shows."""
    num_candidates: int = Field(default=10, ge=MIN_CANDIDATES, le=MAX_CANDIDATES)
    """Candidates per list."""
    block_size: int = Field(default=4, ge=1)
    """Consecutive events of a user in one candidate list; the rest of the list is drawn."""
    reranker_history: int = Field(default=5, ge=0)
    """Most events before a list that the reranker sees."""
    test_frac: float = Field(default=0.1, gt=0, lt=1)
    """Share of the users for test; with protocol "time", share of the events."""
    valid_frac: float = Field(default=0.1, gt=0, lt=1)
    """Share for validation, of what is not for test."""
    drift_windows: int = Field(default=0, ge=0)
    """For the study drift, with protocol "time": test time is cut in so many windows of equally many events, and each test list
    is there once more for every window up to its own, for a user ID@WINDOW, whose history is the last events before that window.
    0: one window, and each list once."""
    known_windows: int = Field(default=0, ge=0)
    """How many of data.drift_windows are known already: training and validation time reach up to their end."""
    partition_mib: int = Field(default=256, ge=1)
    """MiB of unpacked raw text that one worker sorts at a time."""

    @property
    def keeps_repeated_events(self) -> bool:
        return self.repeated_events == "keep" or (not self.repeated_events and self.protocol == "paper")

    @model_validator(mode="after")
    def _windows_fit(self) -> DataSection:
        if self.drift_windows and self.protocol != "time":
            raise ValueError(
                f'drift_windows = {self.drift_windows} needs protocol = "time", not "{self.protocol}"'
            )
        if self.known_windows and self.known_windows >= self.drift_windows:
            raise ValueError(
                f"known_windows = {self.known_windows} leaves none of drift_windows = {self.drift_windows} to test on"
            )
        return self

    @model_validator(mode="after")
    def _block_fits(self) -> DataSection:
        if self.block_size > self.num_candidates:
            raise ValueError(f"block_size {self.block_size} exceeds num_candidates {self.num_candidates}")
        return self


class TextFilesSection(Section):
    """How the CSV and TSV files of a section are written. (Other formats say it themselves.)"""

    delimiter: str = Field(default="", max_length=1)
    """What separates the fields: one character. "": "," in CSV and a tab in TSV, else whichever of , ; | and tab gives the
    columns."""
    encoding: str = ""
    """Encoding of the text, such as "cp1252", "latin-1" or "utf-16". "": UTF-8, or what a byte order mark says."""
    quote: str = Field(default='"', max_length=1)
    """What quotes a field: one character, doubled within the field. "": nothing does."""
    escape: str = Field(default="", max_length=1)
    """What escapes a quote within a field, such as a backslash. "": nothing does."""
    decimal: Literal[".", ","] = "."
    """What begins the fraction of a rating or label. With ",", dots may group thousands."""

    @field_validator("delimiter", mode="before")
    @classmethod
    def _tab(cls, value: object) -> object:
        return "\t" if value in ("\\t", "tab") else value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            return codecs.lookup(value).name if value else ""
        except LookupError:
            raise ValueError('no such encoding; "utf-8", "cp1252", "latin-1" and "utf-16" are some') from None


class TableSection(TextFilesSection):
    """Your own interactions, items and users, for data.dataset = "table". Files and patterns are below data.raw_dir."""

    interactions: Folder = ""
    """File of the interactions: Parquet, CSV, TSV or JSONL. A pattern such as "events/*.parquet" takes several files."""
    user: str = "user_id"
    """Column of the user's id in the interactions."""
    item: str = "item_id"
    """Column of the item's id in the interactions."""
    item_separator: str = ""
    """What separates several items in one cell, in the order in which the user met them. "": each row is one event."""
    interaction_columns: tuple[str, ...] = ()
    """Names of all columns of the interactions, for CSV without a header. Empty: the first line holds them."""
    rating: str = "rating"
    """Column of the rating. "": implicit feedback, every event counts as rated 1."""
    timestamp: str = "timestamp"
    """Column of the time. "": no times, events are in the order of the file."""
    timestamp_unit: TimestampUnit = "s"
    """Unit of the times: seconds, milliseconds, microseconds or nanoseconds since 1970, ISO 8601 text, or a format of strptime
    such as "%m/%d/%Y %I:%M:%S %p". Times in Parquet need none."""
    min_rating: float = 0.0
    """Least rating; a row with a lower one is bad."""
    max_rating: float = 5.0
    """Greatest rating; a row with a higher one is bad."""
    items: Folder = ""
    """File of the items. "": items have no titles."""
    item_id: str = "item_id"
    """Column of the item's id in the items."""
    title: str = "title"
    """Column of the title. "": items have no titles and go by their ids."""
    attributes: dict[str, str] = Field(default_factory=dict)
    """Attributes of an item: name -> column."""
    item_columns: tuple[str, ...] = ()
    """Names of all columns of the items, as interaction_columns."""
    attribute_separator: str = "|"
    """What separates several values in one cell. "": each cell is one value."""
    users: Folder = ""
    """File of the users. "": users have no profile."""
    user_id: str = "user_id"
    """Column of the user's id in the users."""
    user_columns: tuple[str, ...] = ()
    """Names of all columns of the users, as interaction_columns."""
    profile: tuple[str, ...] = ()
    """Columns of the users that the prompt shows, as "age: 25, country: NL"."""


class LoggedSection(TextFilesSection):
    """Your own candidate lists with labels, on top of any dataset. No list is drawn then."""

    file: Folder = ""
    """File of the lists: a path, URI or pattern. Parquet and JSONL with list columns, or CSV and TSV with `separator`. "": lists
    are drawn from the events."""
    columns: tuple[str, ...] = ()
    """Names of all columns, for CSV without a header. Empty: the first line holds them."""
    separator: str = ""
    """What separates the values of a list that is written as one text, such as " ". "": lists are list columns."""
    user: str = "user_id"
    """Column of the user's id."""
    candidates: str = "candidate_item_ids"
    """Column of the candidates' ids."""
    labels: str = "labels"
    """Column of the candidates' labels."""
    label_separator: str = ""
    """What separates each candidate from its label, as "-" in "N1-0 N2-1" (MIND); `labels` is not read then. "": the labels
    are a column."""
    timestamp: str = ""
    """Column of the list's time, which every row must have. "": the log has none."""
    timestamp_unit: TimestampUnit = "s"
    """Unit of the times, as table.timestamp_unit."""
    split: str = ""
    """Column that says train, valid or test in every row. "": split as data.protocol says."""
    history: str = ""
    """Column of the history's ids, oldest first. "" or null: the user's last events before the list."""
    history_ratings: str = ""
    """Column of the history's ratings. "": none."""


class SampleSection(Section):
    """Size of the synthetic sample world, for data.dataset = "sample"."""

    num_users: int = Field(default=600, ge=20)
    """Users."""
    num_items: int = Field(default=320, ge=40)
    """Items."""
    catalogue_seed: int = Field(default=7, ge=0)
    """Seed of the catalogue; run.seed draws the users."""
