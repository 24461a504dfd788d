"""Data sources. To add one: a file with a `describe` that returns a Source, and a line in DATASETS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from dpo4rec_ray.datasets import amazon2018, amazon2023, logged, movielens, synthetic, table
from dpo4rec_ray.datasets.files import absolute
from dpo4rec_ray.datasets.logged import LoggedSettings
from dpo4rec_ray.datasets.source import Source
from dpo4rec_ray.datasets.synthetic import SampleSettings
from dpo4rec_ray.datasets.table import TableSettings
from dpo4rec_ray.errors import UserError


@dataclass(frozen=True)
class SourceSettings:
    """Everything any source may want to know; each takes its part."""

    raw_dir: str = ""
    file: str = ""  # of the interactions, where the folder holds several
    seed: int = 0  # of the sample world's users
    sample: SampleSettings = field(default_factory=SampleSettings)
    table: TableSettings = field(default_factory=TableSettings)
    logged: LoggedSettings = field(default_factory=LoggedSettings)


DATASETS: dict[str, Callable[[SourceSettings], Source]] = {
    "movielens": lambda settings: movielens.describe(settings.raw_dir),
    "amazon2018": lambda settings: amazon2018.describe(settings.raw_dir, settings.file),
    "amazon2023": lambda settings: amazon2023.describe(settings.raw_dir, settings.file),
    "table": lambda settings: table.describe(settings.raw_dir, settings.table),
    "sample": lambda settings: synthetic.describe(settings.sample, settings.seed),
}

__all__ = ["DATASETS", "Source", "SourceSettings", "load_source"]


def load_source(name: str, settings: SourceSettings) -> Source:
    """Dataset `name`, with logged lists on top where they are given. No event is read yet.

    Raises:
        UserError: an unknown name, or files that are not those of the dataset.
    """
    if name not in DATASETS:
        raise UserError(f"data.dataset = {name!r} is unknown; known: {', '.join(DATASETS)}")
    if settings.file and name not in ("amazon2018", "amazon2023"):
        raise UserError(
            f"data.file = {settings.file!r} is for Amazon's files; data.dataset = {name!r} has no use for it"
        )
    if name != "sample" and not settings.raw_dir:
        raise UserError("data.raw_dir is not set; give the folder or URI of the dataset: data.raw_dir=FOLDER")
    settings = replace(settings, raw_dir=absolute(settings.raw_dir))
    source = DATASETS[name](settings)
    if settings.logged.file:
        source = replace(source, lists=logged.describe(absolute(settings.logged.file), settings.logged))
    return source
