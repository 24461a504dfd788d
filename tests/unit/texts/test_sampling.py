"""When a sampling actor takes the next shard, and what it does not import."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from dpo4rec_ray.config import default_config
from dpo4rec_ray.knowledge.completions import Answer, Completion
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.texts.shard_writer import ShardWriter, WritingJob
from dpo4rec_ray.texts.text_source import Row, TextWriter, WriterPlacement
from tests.conftest import ROOT


class Held(TextWriter):
    """Answers when it is let go."""

    def __init__(self, config: object, store: object):
        self.go, self.entered, self.done = threading.Event(), threading.Semaphore(0), 0

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Answer]:
        self.entered.release()
        assert self.go.wait(60)
        return [Answer([Completion([1], "a text", "stop")] * count) for count in counts]

    def finished(self) -> int:
        return self.done


def test_room_follows_the_samples_and_not_the_shards(tmp_path: Path) -> None:
    """100 samples at the same time, so 125 in hand; shards of 40."""
    placement = WriterPlacement(Held, batch=100)
    job = WritingJob(
        default_config(), RunDir(tmp_path), placement, 1, str(tmp_path), "generate", 40, 0, "start"
    )
    writer = ShardWriter(job)
    held = writer._writer
    assert isinstance(held, Held)
    assert writer.has_room({7, 8, 9})
    assert not writer.has_room({7, 8, 9, 10}), "160 samples of shards that are still being read"
    rows = [{"user_id": user} for user in range(4)]
    threads = [
        threading.Thread(target=writer.write, args=(shard, rows, [0] * 4, [10] * 4)) for shard in (7, 8, 9)
    ]
    for thread in threads:
        thread.start()
        assert held.entered.acquire(timeout=60)
    assert writer.has_room({7, 8, 9}), "120 samples"
    assert not writer.has_room({7, 8, 9, 10})
    held.done = 36
    assert writer.has_room({7, 8, 9, 10}), "84 samples and a shard that is being read"
    assert not writer.has_room({7, 8, 9, 10, 11})
    assert writer.users_inside() == 4, "12 users, of whose 120 samples 36 are there"
    held.done = 120
    held.go.set()
    for thread in threads:
        thread.join(60)
    assert writer.has_room({9, 10, 11, 12}), "9 is done but for its file"
    assert writer.users_inside() == 0


def test_a_sampling_actor_imports_no_torch() -> None:
    """It would cost each a second and more; only an engine in the actor's own process needs it."""
    script = "import sys, dpo4rec_ray.texts.sampling; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
