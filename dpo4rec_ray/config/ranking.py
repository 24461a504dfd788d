"""Rerankers, the reward they give, preference pairs, and the evaluation."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from dpo4rec_ray.config.placed import GPUs, Placed
from dpo4rec_ray.config.section import Section, first_mistake
from dpo4rec_ray.errors import nearest


class RerankerArchitecture(Section):
    """What a reranker is; saved beside its weights."""

    backbone: str = "prm"
    """Backbone of the reward, and of the evaluation unless evaluate.backbones names others: dlcm, prm, setrank or mir."""
    knowledge: Literal["regression", "residual", "input"] = "regression"
    """How a text reaches the scores. "input": as features of the input layer, trained with the backbone (the paper's way).
    The others add to the scores of the backbone, which is fitted first without texts and then frozen, and are left out where
    validation shows no gain. "regression": a linear map from the text to a liking of each item, in closed form. "residual": the
    product of the adapter's user and item vectors, trained by the list loss."""
    adapter: str = "hea"
    """What makes features of text vectors, for "residual" and "input": mlp, moe or hea."""
    regression_rank: int = Field(default=64, ge=1)
    """Rank of the map from texts to items ("regression")."""
    regression_ridge: float = Field(default=1.0, gt=0)
    """Weight of the ridge penalty ("regression"); each training user weighs one."""
    knowledge_dropout: float = Field(default=0.3, ge=0, lt=1)
    """Share of the training lists that are scored without the text ("residual")."""
    similarity: bool = True
    """One more input: the cosine of user and item vector. false is the paper's way."""
    input_layer: Literal["linear", "concat"] = "linear"
    """"linear": features pass through a linear layer. "concat": the bare features, as in the paper."""
    embed_dim: int = Field(default=32, ge=1)
    """Width of the embeddings of items and attributes."""
    adapter_dim: int = Field(default=32, ge=1)
    """Width of the adapter's output, for users and for items."""
    hidden_dim: int = Field(default=64, ge=2)
    """Width of the backbone's hidden layers."""
    num_heads: int = Field(default=2, ge=1)
    """Attention heads."""
    num_layers: int = Field(default=1, ge=1)
    """Layers of the backbone."""
    num_shared_experts: int = Field(default=2, ge=1)
    """Experts for both sides (hea)."""
    num_dedicated_experts: int = Field(default=5, ge=1)
    """Experts for each side (moe, hea)."""
    expert_hidden_dim: int = Field(default=128, ge=1)
    """Width of an expert's hidden layer."""


class FitSection(Section):
    """How a reranker is trained: the same with and without knowledge."""

    epochs: int = Field(default=20, ge=1)
    """Epochs, at most; the best one on the validation lists is kept."""
    batch_size: int = Field(default=256, ge=1)
    """Lists per step and worker."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate (AdamW)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the scores in the softmax loss (SetRank)."""
    patience: int = Field(default=0, ge=0)
    """Epochs without a better validation metric before training stops. 0: never."""
    metric: str = "ndcg@5"
    """Validation metric."""
    resample_negatives: bool = True
    """Draw the negatives of the training lists anew in every epoch, because a reranker memorises small data otherwise.
    Validation and test lists stay as they are."""


class RerankerSection(RerankerArchitecture, FitSection):
    """Backbone, adapter and training."""

    per_backbone: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Other values for one backbone, as `dpo4rec search` finds them: [reranker.per_backbone.dlcm] lr = 5e-4."""

    @property
    def architecture(self) -> RerankerArchitecture:
        """The keys that shape the model."""
        return _part(self, RerankerArchitecture)

    @property
    def fit(self) -> FitSection:
        """The keys that shape its training."""
        return _part(self, FitSection)

    def total_epochs(self, without: int, reading: int) -> int:
        """Epochs, at most, of fitting so many rerankers without and with texts. A regression on texts takes none."""
        return self.epochs * (without + (0 if self.knowledge == "regression" else reading))

    @model_validator(mode="after")
    def _per_backbone_fits(self) -> RerankerSection:
        for name in self.per_backbone:
            self.of(name)
        return self

    def of(self, backbone: str) -> RerankerSection:
        """This section as it holds for one backbone."""
        own = self.per_backbone.get(backbone, {})
        values = self.model_dump(exclude={"per_backbone"}) | {"backbone": backbone}
        for key in own:
            if key not in values or key == "backbone":
                raise ValueError(f"per_backbone.{backbone}: unknown key {key}{nearest(key, list(values))}")
        try:
            return RerankerSection.model_validate(values | own)
        except ValidationError as error:
            raise ValueError(f"per_backbone.{backbone}.{first_mistake(error)}") from None


_Part = TypeVar("_Part", RerankerArchitecture, FitSection)


def _part(section: RerankerSection, kind: type[_Part]) -> _Part:
    # Without validation: the values were validated when the section was made.
    return kind.model_construct(**{name: getattr(section, name) for name in kind.model_fields})


Reader = Literal["llm", "statistics"]


class RewardSection(Placed):
    """The reward rerankers, and the reward of a text (docs/method.md, section 4)."""

    placement = Placed.placement | {"num_scorers", "cpus_per_scorer", "gpus_per_worker"}
    metric: str = "log_likelihood"
    """Metric per list whose mean is the reward: log_likelihood, or ndcg, map, map_paper, mrr or hr with @k."""
    compare: tuple[str, ...] = ("ndcg@5", "map@5", "mrr@10", "log_likelihood")
    """Further metrics that `score` reports on. Pairs come from `metric` alone."""
    num_redraws: int = Field(default=8, ge=0)
    """How often a list is scored with the same positives and new negatives; the reward is the mean. 0: the lists as they are."""
    hard_negatives: float = Field(default=0.0, ge=0, le=2)
    """Power of the popularity by which redrawn negatives are drawn; 0 is uniform. Higher powers make harder
    negatives, and more of them are items that the user likes elsewhere (MovieLens-1M: 6 % at 0, 13 % at 0.5, 21 % at 1)."""
    personal: int = Field(default=0, ge=0)
    """Other users whose lists a text is tried on too. The reward is then what the text is worth to its user minus what it is
    worth to them on average, so that a manner that helps everybody earns nothing. 0: the plain reward, the paper's way."""
    reader: tuple[Reader, ...] = ("statistics",)
    """Whose texts the reward's rerankers are trained on, and the first of them chosen on: "llm" (its own, the paper's way),
    "statistics" (counted from the histories; they say what they know in one form, so that a reranker learns to read), or both."""
    reader_texts: int = Field(default=1, ge=1)
    """Texts of each training user and reader that they are trained on; the first one counts the whole history."""
    must_read: bool = True
    """Stop before an LLM is trained if the reward's rerankers do not read: the interval of the shuffle drop includes 0."""
    oracle: bool = False
    """Measure what a text would bring that was made from what the user likes later: the ceiling of the way from text to ranking.
    Such texts are in no result."""
    num_folds: int = Field(default=5, ge=1)
    """Folds of users. A user's texts are scored by a reranker that was trained without the user. 1 is the paper's way."""
    num_workers: int = Field(default=1, ge=1)
    """1: each fold is a Ray task, and several run at the same time. More: folds one by one, each under Ray Train."""
    num_scorers: int = Field(default=1, ge=1)
    """Scorers at the same time."""
    cpus_per_scorer: float = Field(default=1, gt=0)
    """CPUs of a scorer."""
    gpus_per_worker: GPUs = 0
    """GPUs of a training worker or a scorer."""


class PairSection(Section):
    """Which texts become a preference pair."""

    rule: str = "best_vs_worst"
    """Pairing rule. "best_vs_worst": one pair per user, the paper's way. "top_vs_bottom": the i-th best text against the i-th
    worst. Two controls with as many pairs: "random", a user's texts in random order, and "worst_vs_best", the wrong way round."""
    pairs_per_user: int = Field(default=1, ge=1)
    """Most pairs per user (all rules but best_vs_worst). N texts make N / 2 pairs at most."""
    first_samples: int = Field(default=0, ge=0)
    """Pairs of each user's first so many texts alone, so that one generation shows what fewer texts would teach. 0: of all. For
    DPO; the other learners read all texts."""
    min_margin: float = Field(default=0.0, ge=0)
    """Least difference between the rewards of chosen and rejected; what lies below it gives no pair."""
    min_std_errors: float = Field(default=0.0, ge=0)
    """Least difference between the rewards of chosen and rejected, in standard errors of that difference (pooled over users,
    over the square root of the user's lists): leaves out pairs that luck explains. 0: none."""
    others_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the pairs whose rejected text is another user's best, under this user's prompt, against this user's best: only
    reading the history tells them apart. Held-out users have one such pair each at any share, to measure it."""
    others_hardness: float = Field(default=0.0, ge=0, le=1)
    """How alike the other user is: 0 draws among all users, 0.9 among the tenth whose liked items are most like this user's.
    The 5 % who are most alike are left out."""
    num_rejected: int = Field(default=1, ge=1)
    """Most rejected texts per chosen one: the worst texts (dpo.loss = "softmax" uses several)."""
    shrinkage: bool = False
    """Pull each reward towards its user's mean, the less reliable the more. min_margin then means the difference that is
    expected on other lists."""


class EvaluateSection(Placed):
    """The evaluation on the test users."""

    placement = Placed.placement | {"gpus_per_task"}
    backbones: tuple[str, ...] = ()
    """Backbones to fit. Empty: reranker.backbone alone."""
    num_seeds: int = Field(default=3, ge=1)
    """Fits of each system, with different seeds."""
    num_texts: int = Field(default=4, ge=1)
    """Texts of each test user that an LLM's system is measured with, of each policy: its metrics are their mean, as a single
    text is one draw of many. With a cut in time, users who have other lists too have one text. Serving has the first. A change
    writes no text anew; `--from encode` does."""
    references: tuple[Literal["statistics", "random"], ...] = ("statistics", "random")
    """Texts that the LLM's are compared with. "statistics": counted from the histories, which every LLM has to beat. "random":
    the same texts, but each user has another user's."""
    num_resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples of the users, for the intervals."""
    gpus_per_task: GPUs = 0
    """GPUs of a fit."""
