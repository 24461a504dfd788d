"""Free texts in place of a user (serving.query = "text"): encoded as if they were the text about the user."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.config.texts import EncoderSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.encoder import TextEncoder
from dpo4rec_ray.serving.version_files import ENCODER_FILE, VersionFiles


class QueryTexts:
    """The encoders of the versions. Texts are encoded one after the other, in a thread of their own."""

    def __init__(self, device: str):
        self._device = device
        self._encoders: dict[str, TextEncoder] = {}  # versions mostly share one
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def encoder(self, version: VersionFiles) -> TextEncoder:
        """The version's encoder; the first call with it loads it, which takes seconds.

        Raises:
            UserError: the version reads no texts, does not say how they are encoded, or the encoder cannot be loaded.
        """
        name, file = version.card.version, version.folder / ENCODER_FILE
        if not version.card.knowledge:
            raise UserError(
                f'version {name} reads no texts, so its users cannot be asked for by text; set serving.query = "user" '
                "or promote a version that reads texts"
            )
        if not file.is_file():
            raise UserError(
                f"version {name} has no {ENCODER_FILE}, which older versions lack; publish its run again"
            )
        section = EncoderSection.model_validate_json(file.read_bytes())
        known = section.model_dump_json(exclude=set(section.placement))
        if known not in self._encoders:
            self._encoders[known] = TextEncoder(section, self._device)
        return self._encoders[known]

    async def vector(self, version: VersionFiles, text: str) -> npt.NDArray[np.float32]:
        """[D]. Raises as `encoder`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encoded, version, text)

    def _encoded(self, version: VersionFiles, text: str) -> npt.NDArray[np.float32]:
        return self.encoder(version).encode([text])[0]
