from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from dpo4rec_ray.knowledge.gate import Gate


def test_the_gate_lets_many_in_or_one_alone() -> None:
    gate, inside, most, lock = Gate(), {"shared": 0, "alone": 0}, {"shared": 0, "alone": 0}, threading.Lock()

    def enter(how: str) -> None:
        with gate.alone() if how == "alone" else gate.shared():
            with lock:
                inside[how] += 1
                most[how] = max(most[how], inside[how])
                assert not inside["alone"] or inside == {"shared": 0, "alone": 1}
            time.sleep(0.02)
            with lock:
                inside[how] -= 1

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(enter, ["shared", "shared", "shared", "alone"] * 9))
    assert most["shared"] > 1 and most["alone"] == 1


def test_who_is_alone_may_still_ask() -> None:
    gate = Gate()
    with gate.alone(), gate.shared():
        pass
    with gate.shared():
        pass
