"""Texts to vectors: each text its own, and no text none."""

from __future__ import annotations

import numpy as np

from dpo4rec_ray.config.texts import EncoderSection
from dpo4rec_ray.knowledge.encoder import TextEncoder


def test_no_text_has_no_vector() -> None:
    """A user without a text is ranked by the backbone, as one whom nobody knows."""
    encoder = TextEncoder(EncoderSection(), "cpu")
    one, none, blank, other, again = encoder.encode(
        ["likes westerns", "", " \n", "likes romance", "likes westerns"]
    )
    assert not none.any() and not blank.any()
    assert np.array_equal(one, again) and not np.allclose(one, other)
    np.testing.assert_allclose(one, encoder.encode(["likes westerns"])[0], atol=1e-5)
