"""Data sources. To add one: a file with `load(raw_dir, *, max_users) -> RawTables` and a line in DATASETS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dpo4rec_ray.datasets import movielens, sample
from dpo4rec_ray.datasets.raw import RawTables
from dpo4rec_ray.datasets.sample import SampleSettings
from dpo4rec_ray.errors import UserError

DATASETS: dict[str, Callable[..., RawTables]] = {
    "movielens": movielens.load,
    "sample": sample.load,
}

__all__ = ["DATASETS", "RawTables", "load_raw"]


def load_raw(
    name: str, raw_dir: str | Path, *, max_users: int = 0, seed: int = 0, sample: SampleSettings | None = None
) -> RawTables:
    """Read dataset `name`.

    A dataset on disk reads `raw_dir` and keeps the first `max_users` users (0: all). The sample world has
    no folder: it is made from its settings and `seed`.

    Raises:
        UserError: an unknown name, or files that cannot be read as the dataset they should be.
    """
    if name not in DATASETS:
        raise UserError(f"data.dataset = {name!r} is unknown; known: {', '.join(DATASETS)}")
    if name == "sample":
        return DATASETS[name](sample or SampleSettings(), seed)
    return DATASETS[name](raw_dir, max_users=max_users)
