from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_ray.core.keys import below, keys_of, mix, partition_of, stream, string_keys


def keys(texts: list[str]) -> np.ndarray:
    encoded = [text.encode() for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in encoded])]).astype(np.int32)
    return string_keys(offsets, np.frombuffer(b"".join(encoded), dtype=np.uint8))


def splitmix(value: int) -> int:
    """splitmix64's finaliser in plain integers."""
    mask = 2**64 - 1
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31


def test_keys_by_plain_integers() -> None:
    """A string is mixed in words of eight little-endian bytes, after its length."""
    golden = 0x9E3779B97F4A7C15
    for text in ("", "a", "abcdefgh", "A1B2C3D4E5F6G7H8I"):
        content = text.encode()
        key = splitmix((len(content) + golden) % 2**64)
        for place in range(0, len(content), 8):
            key = splitmix(key ^ int.from_bytes(content[place : place + 8], "little"))
        assert keys([text]).tolist() == [key]


@given(st.lists(st.text(max_size=20), max_size=40), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_a_key_depends_on_its_string_alone(texts: list[str], random: object) -> None:
    """Equal strings have equal keys, different ones different keys, wherever they stand."""
    found = dict(zip(texts, keys(texts).tolist(), strict=True))
    assert len(set(found.values())) == len(set(texts))
    again = list(reversed(texts))
    assert keys(again).tolist() == [found[text] for text in again]


def test_a_slice_of_an_arrow_column() -> None:
    whole = pa.array(["user1", "x" * 30, "", "user1"])
    part = whole.slice(1, 3)
    assert keys_of(part).tolist() == keys(["x" * 30, "", "user1"]).tolist()


def test_partitions_are_ranges_of_keys_of_about_equal_size() -> None:
    found = np.sort(keys([f"user {number}" for number in range(20_000)]))
    for number in (1, 3, 16):
        partition = partition_of(found, number)
        assert (np.diff(partition) >= 0).all()
        counts = np.bincount(partition, minlength=number)
        assert counts.min() > 0.9 * 20_000 / number


def test_draws_are_uniform_and_independent_of_each_other() -> None:
    bits = stream(mix(np.arange(50_000, dtype=np.uint64))[:, None], np.arange(2)[None, :])
    drawn = below(bits, 7)
    assert drawn.min() == 0 and drawn.max() == 6
    np.testing.assert_allclose(
        np.bincount(drawn[:, 0]) / 50_000, 1 / 7, atol=0.007
    )  # 4.5 standard deviations
    pairs = np.bincount(drawn[:, 0] * 7 + drawn[:, 1], minlength=49)
    np.testing.assert_allclose(pairs / 50_000, 1 / 49, atol=0.003)
