"""The architecture's keys: declared once in the config, saved with the weights, and read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo4rec_ray.config import ranking
from dpo4rec_ray.config.ranking import FitSection, RerankerArchitecture, RerankerSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers import build_reranker
from dpo4rec_ray.rerankers import fit as fit_module
from dpo4rec_ray.rerankers.fit import fit, load_reranker, save_reranker
from tests.unit.rerankers.builders import build

# As releases before 0.2 wrote them.
OLD_SETTINGS = {
    "backbone": "mir",
    "adapter": "moe",
    "similarity": False,
    "input_layer": "concat",
    "embed_dim": 16,
    "adapter_dim": 24,
    "num_shared_experts": 3,
    "num_dedicated_experts": 4,
    "expert_hidden_dim": 40,
    "hidden_dim": 48,
    "num_heads": 4,
    "num_layers": 2,
}
# What came later, as it holds for a reranker that was saved before.
SINCE = {"knowledge": "input", "regression_rank": 64, "regression_ridge": 1.0, "knowledge_dropout": 0.3}


def test_the_file_has_the_keys_it_always_had(small, tmp_path: Path) -> None:
    """No key of the training is saved with the architecture, and an old file loads with its own values."""
    section = RerankerSection(**OLD_SETTINGS, **SINCE)
    model = build_reranker(section.architecture, small.catalogue.shape, True)
    save_reranker(tmp_path, model, {})
    file = tmp_path / "reranker.json"
    card = json.loads(file.read_text(encoding="utf-8"))
    assert card["settings"] == OLD_SETTINGS | SINCE
    file.write_text(json.dumps(card | {"settings": OLD_SETTINGS}), encoding="utf-8")
    assert load_reranker(tmp_path, small.catalogue).architecture.model_dump() == OLD_SETTINGS | SINCE


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dropuot": 0.5}, "settings.dropuot = 0.5"), ({"input_layer": "linaer"}, "'linear' or 'concat'")],
)
def test_a_saved_value_that_is_not_known_is_named_on_one_line(
    change: dict[str, object], message: str, small, tmp_path: Path
) -> None:
    save_reranker(tmp_path, build("prm", small.catalogue.shape, True), {})
    file = tmp_path / "reranker.json"
    card = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(card | {"settings": card["settings"] | change}), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        load_reranker(tmp_path, small.catalogue)
    assert "\n" not in str(refused.value) and message in str(refused.value)
    assert str(file) in str(refused.value)


def test_a_new_hyper_parameter_is_declared_in_one_place(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more field of a section is in the model, the saved file, the loaded model, and what `fit` gets."""

    class Wider(RerankerArchitecture):
        dropout: float = 0.1

    class Longer(FitSection):
        warmup: int = 3

    class Section(RerankerSection, Wider, Longer):
        pass

    for module in (ranking, fit_module):
        monkeypatch.setattr(module, "RerankerArchitecture", Wider)
        monkeypatch.setattr(module, "FitSection", Longer)
    section = Section(dropout=0.3, warmup=7, epochs=1)
    model = build_reranker(section.architecture, small.catalogue.shape, True)
    assert model.architecture.dropout == 0.3
    save_reranker(tmp_path, model, {})
    assert load_reranker(tmp_path, small.catalogue).architecture == model.architecture
    assert section.fit == Longer(warmup=7, epochs=1)
    result = fit(model, small.catalogue, small.train, small.valid, small.user_vectors, section.fit)
    assert len(result.history) == 1
