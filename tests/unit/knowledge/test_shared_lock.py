from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from dpo4rec_ray.knowledge.shared_lock import SharedLock


def test_the_lock_lets_many_in_or_one_alone() -> None:
    lock, inside, most, counting = (
        SharedLock(),
        {"shared": 0, "alone": 0},
        {"shared": 0, "alone": 0},
        threading.Lock(),
    )

    def enter(how: str) -> None:
        with lock.alone() if how == "alone" else lock.shared():
            with counting:
                inside[how] += 1
                most[how] = max(most[how], inside[how])
                assert not inside["alone"] or inside == {"shared": 0, "alone": 1}
            time.sleep(0.02)
            with counting:
                inside[how] -= 1

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(enter, ["shared", "shared", "shared", "alone"] * 9))
    assert most["shared"] > 1 and most["alone"] == 1


def test_who_is_alone_may_still_ask() -> None:
    lock = SharedLock()
    with lock.alone(), lock.shared():
        pass
    with lock.shared():
        pass
