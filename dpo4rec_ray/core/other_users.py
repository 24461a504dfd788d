"""Whose text is rejected under a user's prompt, so that only reading the history tells it from the user's own.

The text is the best of its own user: well made, and about somebody else. The more alike the two users are, the harder
the pair; users who are all but the same are left out, because there the other's text may be right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

TOO_ALIKE = 0.05  # share of the candidates, the most similar ones, that are left out where similarity decides


def draw_others(
    similarity: npt.NDArray[Any], num_others: int, hardness: float, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Up to `num_others` of the candidates, as places in `similarity`, in random order.

    similarity: [P] of the candidates to the user, -inf for the user itself, who is never drawn. hardness: 0 draws among all of
    them; h leaves out the TOO_ALIKE most similar and draws among the 1 - h most similar of the others.

    Raises:
        ValueError: hardness is not in [0, 1].
    """
    if not 0 <= hardness <= 1:
        raise ValueError(f"hardness {hardness} is not in [0, 1]")
    places = np.flatnonzero(similarity > -np.inf)
    if hardness:
        places = places[np.argsort(-similarity[places], kind="stable")]
        places = places[int(TOO_ALIKE * len(places)) :]
        places = places[: max(num_others, round((1 - hardness) * len(places)))]
    return rng.choice(places, min(num_others, len(places)), replace=False).astype(np.int64)


def taste_vectors(
    histories: list[npt.NDArray[Any]], liked: list[npt.NDArray[np.bool_]], item_vectors: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """Unit vectors of what users like: the mean of their liked items' vectors, less the catalogue's mean. [U, D].

    histories: item ids of each user; liked: which of them the user likes. A user who likes none counts with all items of the
    history; one without a history gets zeros. The dot product of two users is their similarity.
    """
    centred = item_vectors.astype(np.float32) - item_vectors.mean(axis=0, dtype=np.float32)
    found = np.zeros((len(histories), item_vectors.shape[1]), np.float32)
    for row, (items, good) in enumerate(zip(histories, liked, strict=True)):
        if len(items):
            found[row] = centred[items[good] if good.any() else items].mean(axis=0)
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    return np.divide(found, norms, out=found, where=norms > 0)
