"""Data sources. To add one: a file with a `describe` that returns a Source, and a line in DATASETS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dpo4rec_ray.config import Config
from dpo4rec_ray.datasets import amazon2018, amazon2023, logged, movielens, recbole, synthetic, table
from dpo4rec_ray.datasets.files import absolute
from dpo4rec_ray.datasets.source import Source
from dpo4rec_ray.errors import UserError

DATASETS: dict[str, Callable[[Config], Source]] = {
    "movielens": lambda config: movielens.describe(absolute(config.data.raw_dir)),
    "amazon2018": lambda config: amazon2018.describe(absolute(config.data.raw_dir), config.data.file),
    "amazon2023": lambda config: amazon2023.describe(absolute(config.data.raw_dir), config.data.file),
    "recbole": lambda config: recbole.describe(
        absolute(config.data.raw_dir), config.data.file, config.table.timestamp_unit
    ),
    "table": lambda config: table.describe(absolute(config.data.raw_dir), config.table),
    "sample": lambda config: synthetic.describe(config.sample, config.run.seed),
}

__all__ = ["DATASETS", "Source", "load_source"]


def load_source(config: Config) -> Source:
    """The dataset that the recipe names, with logged lists where `logged.file` is set. No event is read yet.

    Raises:
        UserError: keys that contradict each other, or files that are not those of the dataset.
    """
    data, log = config.data, config.logged
    if data.file and data.dataset not in ("amazon2018", "amazon2023", "recbole"):
        raise UserError(
            f"data.file = {data.file!r} is for the files of Amazon and RecBole; leave it out with data.dataset = "
            f"{data.dataset!r}"
        )
    if data.dataset != "sample" and not data.raw_dir:
        raise UserError("data.raw_dir is not set; give the folder or URI of the dataset: data.raw_dir=FOLDER")
    if log.file and (data.user_core or data.item_core or data.protocol == "time"):
        raise UserError(
            "logged.file is set, and logged lists are taken as they are; leave out data.user_core, data.item_core and "
            'data.protocol = "time"'
        )
    source = DATASETS[data.dataset](config)
    return replace(source, lists=logged.describe(absolute(log.file), log)) if log.file else source
