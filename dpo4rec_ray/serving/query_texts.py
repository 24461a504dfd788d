"""Free texts in place of a user (serving.query = "text"): encoded as if they were the text about the user."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.knowledge.encoder import TextEncoder
from dpo4rec_ray.serving.batcher import Batcher, Overloaded
from dpo4rec_ray.serving.version_files import VersionFiles

# A text takes some 20 times as long as a list: with so many of them, the last one that waits waits for seconds.
MAX_BATCH, MAX_WAITING = 16, 64
QueuedText = tuple[VersionFiles, str]  # a text, and the version that reads it


class QueryTexts:
    """The encoders of the versions. Texts that arrive together are encoded together, in a thread of their own."""

    def __init__(self, device: str):
        self._device = device
        self._encoders: dict[str, TextEncoder] = {}  # versions mostly share one
        self._loading = threading.Lock()
        self._batcher: Batcher[QueuedText, npt.NDArray[np.float32]] = Batcher(
            self._encoded, MAX_BATCH, MAX_WAITING, size=lambda _: 1, max_in_loop=0
        )

    def encoder(self, version: VersionFiles) -> TextEncoder:
        """The version's encoder; the first call with it loads it, which takes seconds.

        Raises:
            UserError: the version reads no texts, does not say how they are encoded, or the encoder cannot be loaded.
        """
        section = version.encoder
        known = section.model_dump_json(exclude=set(section.placement))
        if (found := self._encoders.get(known)) is not None:  # never behind one that is being loaded
            return found
        with self._loading:
            if known not in self._encoders:
                self._encoders[known] = TextEncoder(section, self._device)
            return self._encoders[known]

    async def vector(self, version: VersionFiles, text: str) -> npt.NDArray[np.float32]:
        """[D]. Raises as `encoder`, and Overloaded: too many texts wait."""
        return await self._batcher((version, text))

    async def spare(self, version: VersionFiles, text: str) -> npt.NDArray[np.float32]:
        """As `vector`, for a shadow: Overloaded as soon as anything else is encoded."""
        if self._batcher.busy:
            raise Overloaded
        return await self.vector(version, text)

    def _encoded(self, queued: Sequence[QueuedText]) -> list[npt.NDArray[np.float32] | Exception]:
        """Per text its vector, or why its version has none."""
        groups: dict[TextEncoder, list[int]] = {}
        found: list[npt.NDArray[np.float32] | Exception] = [RuntimeError()] * len(queued)
        for place, (version, _) in enumerate(queued):
            try:
                groups.setdefault(self.encoder(version), []).append(place)
            except Exception as error:
                found[place] = error
        for encoder, places in groups.items():
            for place, vector in zip(
                places, encoder.encode([queued[place][1] for place in places]), strict=True
            ):
                found[place] = vector
        return found
