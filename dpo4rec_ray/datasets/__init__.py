"""Data sources. To add one: a file with a `describe` that returns a Source, and a line in DATASETS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dpo4rec_ray.config.data import DataSection, LoggedSection, SampleSection, TableSection
from dpo4rec_ray.datasets import amazon2018, amazon2023, logged, movielens, synthetic, table
from dpo4rec_ray.datasets.files import absolute
from dpo4rec_ray.datasets.source import Source
from dpo4rec_ray.errors import UserError


@dataclass(frozen=True)
class SourceSections:
    """The sections of a recipe that say what the data is, and the seed of the sample world's users."""

    data: DataSection
    table: TableSection
    logged: LoggedSection
    sample: SampleSection
    seed: int

    @property
    def raw_dir(self) -> str:
        return absolute(self.data.raw_dir)


DATASETS: dict[str, Callable[[SourceSections], Source]] = {
    "movielens": lambda sections: movielens.describe(sections.raw_dir),
    "amazon2018": lambda sections: amazon2018.describe(sections.raw_dir, sections.data.file),
    "amazon2023": lambda sections: amazon2023.describe(sections.raw_dir, sections.data.file),
    "table": lambda sections: table.describe(sections.raw_dir, sections.table),
    "sample": lambda sections: synthetic.describe(sections.sample, sections.seed),
}

__all__ = ["DATASETS", "Source", "SourceSections", "load_source"]


def load_source(sections: SourceSections) -> Source:
    """The dataset that the sections name, with logged lists where `logged.file` is set. No event is read yet.

    Raises:
        UserError: an unknown name, keys that contradict each other, or files that are not those of the dataset.
    """
    data, log = sections.data, sections.logged
    if data.dataset not in DATASETS:
        raise UserError(f"data.dataset = {data.dataset!r} is unknown; known: {', '.join(DATASETS)}")
    if data.file and data.dataset not in ("amazon2018", "amazon2023"):
        raise UserError(
            f"data.file = {data.file!r} is for Amazon's files; leave it out with data.dataset = {data.dataset!r}"
        )
    if data.dataset != "sample" and not data.raw_dir:
        raise UserError("data.raw_dir is not set; give the folder or URI of the dataset: data.raw_dir=FOLDER")
    if log.file and (data.user_core or data.item_core or data.protocol == "time"):
        raise UserError(
            "logged.file is set, and logged lists are taken as they are; leave out data.user_core, data.item_core and "
            'data.protocol = "time"'
        )
    source = DATASETS[data.dataset](sections)
    return replace(source, lists=logged.describe(absolute(log.file), log)) if log.file else source
