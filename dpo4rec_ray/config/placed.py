"""Where the workers of a section may run: the keys that every section with workers has."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from dpo4rec_ray.config.section import Section

# As Kubernetes has labels: a value, none of a value, one of several, none of several.
_VALUE = r"[a-zA-Z0-9](?:[\w.-]{0,61}[a-zA-Z0-9])?"
SELECTOR = re.compile(rf"!?(?:{_VALUE}|in\({_VALUE}(?:, ?{_VALUE})*\))")


def _shareable(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("a fraction shares one GPU; above 1 it is a whole number")
    return gpus


# GPUs of one worker: a fraction of one, or a whole number.
GPUs = Annotated[float, Field(ge=0), AfterValidator(_shareable)]
# Fractions of a custom resource too.
Amount = Annotated[float, Field(gt=0)]


class Placed(Section):
    """What a node must have for a worker of this section to run there, beside CPUs and GPUs."""

    placement = frozenset(
        {"accelerator_type", "label_selector", "resources", "memory_gib", "placement_strategy"}
    )
    accelerator_type: str = ""
    """Type of GPU that a worker's node must have, as Ray names it: "A10G", "H100", ... "": any."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a worker's node must have: "value", "!value", "in(a, b)" or "!in(a, b)" by label; for instance
    "ray.io/market-type" = "on-demand"."""
    resources: dict[str, Amount] = Field(default_factory=dict)
    """Custom resources that a worker takes, as nodes name them when Ray is started there."""
    memory_gib: float = Field(default=0, ge=0)
    """GiB of memory that Ray keeps for a worker. 0: none is kept, any node will do."""
    placement_strategy: Literal["", "PACK", "SPREAD"] = ""
    """"PACK": on few nodes. "SPREAD": over many. "": as Ray does it, which packs training and tasks and spreads pools."""

    @field_validator("label_selector")
    @classmethod
    def _as_ray_reads_them(cls, selector: dict[str, str]) -> dict[str, str]:
        for name, value in selector.items():
            if not SELECTOR.fullmatch(value):
                raise ValueError(
                    f'{name} = {value!r} is none of "value", "!value", "in(a, b)" and "!in(a, b)"'
                )
        return selector

    @field_validator("resources")
    @classmethod
    def _custom(cls, resources: dict[str, float]) -> dict[str, float]:
        if named := resources.keys() & {"CPU", "GPU", "memory", "object_store_memory"}:
            raise ValueError(f"{', '.join(sorted(named))} has a key of its own")
        return resources
