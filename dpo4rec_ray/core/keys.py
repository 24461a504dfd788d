"""64-bit keys of strings, and random numbers that depend on a key alone.

Raw ids become integers without a dictionary that all machines would have to share: a key is a hash of the id, the same
on every machine. The probability that two of n ids get the same key is n^2 / 2^65 (15 million ids: 6e-6), which is
accepted. Draws are hashes too, so they depend neither on the number of partitions nor on the order of the work.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Keys = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORD = 8
_ALL = 2**64 - 1


def string_keys(offsets: npt.NDArray[Any], content: npt.NDArray[np.uint8]) -> Keys:
    """One key per string. offsets: [n + 1] into content, as Arrow keeps strings -> [n]."""
    starts = offsets[:-1].astype(np.int64)
    lengths = np.diff(offsets).astype(np.int64)
    padded = np.concatenate([content, np.zeros(_WORD, dtype=np.uint8)])
    # A view in which a word begins at every byte, so that words are gathered without a copy per string.
    words = np.ndarray(shape=(len(content) + 1,), dtype="<u8", buffer=padded.data, strides=(1,))
    keys = mix(lengths.astype(np.uint64) + _GOLDEN)
    for place in range(0, int(lengths.max(initial=0)), _WORD):
        longer = lengths > place
        rows: Any = slice(None) if longer.all() else np.flatnonzero(longer)
        left = np.minimum(lengths[rows] - place, _WORD).astype(np.uint64)
        kept = words[starts[rows] + place] & (~np.uint64(0) >> ((np.uint64(_WORD) - left) * np.uint64(8)))
        keys[rows] = mix(keys[rows] ^ kept)
    return keys


def keys_of(column: pa.ChunkedArray | pa.StringArray) -> Keys:
    """One key per string of an Arrow column without nulls, [n]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not len(array):
        return np.zeros(0, dtype=np.uint64)
    _, offsets, content = array.buffers()
    places = np.frombuffer(offsets, dtype=np.int32)[array.offset : array.offset + len(array) + 1]
    return string_keys(places, np.frombuffer(content or b"", dtype=np.uint8))


def string_key(content: bytes) -> int:
    """`string_keys` of one string, several times faster than an array of one."""
    key = _mix_one(len(content) + int(_GOLDEN) & _ALL)
    for place in range(0, len(content), _WORD):
        key = _mix_one(key ^ int.from_bytes(content[place : place + _WORD], "little"))
    return key


def _mix_one(value: int) -> int:
    """`mix` of one value."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _ALL
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _ALL
    return value ^ (value >> 31)


def mix(values: npt.NDArray[np.uint64]) -> Keys:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014): a bijection in which every output bit depends on every input bit."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def stream(keys: Keys, number: int | npt.NDArray[Any]) -> Keys:
    """The `number`-th 64 random bits of each key; shapes broadcast."""
    with np.errstate(over="ignore"):
        return mix(keys + _GOLDEN * (np.asarray(number).astype(np.uint64) + np.uint64(1)))


def below(bits: Keys, bound: int) -> npt.NDArray[np.int64]:
    """Random bits -> integers 0..bound-1."""
    return ((bits >> np.uint64(11)).astype(np.float64) * (2.0**-53 * bound)).astype(np.int64)


def random_places(ids: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.float64]:
    """A random number in [0, 1) per id, [n] -> [n], which depends on the id and the seed alone."""
    bits = stream(mix(ids.astype(np.uint64) + _GOLDEN), seed)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def partition_of(keys: Keys, num_partitions: int) -> npt.NDArray[np.int64]:
    """Partition 0..num_partitions-1 by the key's upper bits, so that partitions hold ranges of keys in order."""
    return ((keys >> np.uint64(32)) * np.uint64(num_partitions) >> np.uint64(32)).astype(np.int64)


def seed_of(*parts: object) -> int:
    """A 31-bit seed from (run seed, stage, round, user id, ...), the same on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF
