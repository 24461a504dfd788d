"""A logits processor that ends or hangs the engine at certain prompts: how a prompt that kills engines looks to us."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor

HOW = "TEST_POISON"  # environment variable: "kill" or "hang"


def is_poison(prompt_token_ids: Sequence[int]) -> bool:
    """About one prompt in thirty, at random."""
    return sum(prompt_token_ids) % 31 == 0


class Poison(LogitsProcessor):
    """Leaves logits as they are."""

    def __init__(self, *_: Any):
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        for _, _, prompt, _ in batch_update.added if batch_update else []:
            if is_poison(prompt or []):
                if os.environ[HOW] == "hang":
                    time.sleep(3600)
                os.kill(os.getpid(), signal.SIGKILL)

    def apply(self, logits: Any) -> Any:
        return logits
