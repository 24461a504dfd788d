"""A whole recipe: all sections in the order in which the stages use them."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dpo4rec_ray.config.data import DataSection, LoggedSection, SampleSection, TableSection
from dpo4rec_ray.config.ranking import EvaluateSection, PairSection, RerankerSection, RewardSection
from dpo4rec_ray.config.section import Folder, Section
from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.config.texts import (
    EncoderSection,
    GenerateSection,
    LLMSection,
    OpenAISection,
    PromptSection,
    TextsSection,
)
from dpo4rec_ray.config.training import (
    BestOfNSection,
    BootstrapSection,
    DPOSection,
    GRPOSection,
    PolicySection,
)

AUTO_ROUNDS = 10  # more than ever helped; a bound all the same, for `plan` and for folders


class RunSection(Section):
    """Where the run lives and how long it goes on."""

    name: str = ""
    """Name of the run folder, below run.root. "": the recipe's file name."""
    root: Folder = "runs"
    """Folder of the run folders: a path, or a URI such as s3://bucket/runs. On a cluster, storage that every node sees."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn."""
    num_rounds: Annotated[int, Field(ge=0)] | Literal["auto"] = 1
    """Most rounds. 0: no training of the LLM; the base LLM's texts are evaluated. "auto": as many as help beyond chance,
    by run.patience; 10 at most."""
    turns_per_round: int = Field(default=1, ge=1)
    """Turns of a round. Each samples another part of the training users from the newest policy, scores the texts and learns from
    them: on-policy training. Only the last turn's policy writes the round's texts. Folders and --round count turns."""
    watched_users: float = Field(default=0.25, gt=0, le=1)
    """With several turns: share of the validation users whose texts every turn samples and scores. The first samples all."""
    patience: int = Field(default=1, ge=1)
    """Rounds that are no better than the best one before the run stops. A round is better if its held-out reward is higher and
    its reading is not clearly lower."""
    retrain_reward: bool = False
    """Train the reward's rerankers anew before each further round, on the texts of the round before ("llm" in reward.reader): the
    LLM and the recommender move in turns. Rounds are compared by the first rerankers all the same."""
    keep_pairs: bool = False
    """Train each round on the pairs of the rounds before it too (policy.objective = "dpo")."""
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Experiment trackers: one run of theirs has the figures of all rounds and of the evaluation, and a further one per training
    the metrics of its steps."""

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if "/" in name or name in (".", ".."):
            raise ValueError("the name of a folder, without a path; the path is run.root")
        return name

    @model_validator(mode="after")
    def _no_pattern(self) -> Self:
        if "://" in self.root and any(one in self.name for one in "*?[]"):
            raise ValueError(f"name = {self.name!r}: * ? [ ] are patterns in object stores; use another name")
        return self

    @property
    def max_rounds(self) -> int:
        """Most rounds, as a number."""
        return AUTO_ROUNDS if self.num_rounds == "auto" else self.num_rounds

    @property
    def num_turns(self) -> int:
        """Most turns of the whole run."""
        return self.max_rounds * self.turns_per_round

    def round_of(self, turn: int) -> int:
        """The round that a turn belongs to; 0 before the first."""
        return -(-turn // self.turns_per_round)

    def first_turn(self, turn: int) -> int:
        """The first turn of a turn's round."""
        return (self.round_of(turn) - 1) * self.turns_per_round + 1

    def reward_of(self, turn: int) -> int:
        """The number of the reward whose rerankers score a turn's texts: 0 the first, else the turn they were trained for."""
        return self.first_turn(turn) if self.retrain_reward and self.round_of(turn) > 1 else 0

    def called(self, turn: int) -> str:
        """A turn's name for users: that of its round where the round has no other."""
        return f"{'round' if self.turns_per_round == 1 else 'turn'} {turn}"

    def ends_round(self, turn: int) -> bool:
        """Whether it is its round's last turn."""
        return turn % self.turns_per_round == 0

    def round_ends(self, last_turn: int) -> range:
        """The last turns of all rounds up to `last_turn`, the base LLM's 0 before them."""
        return range(0, last_turn + 1, self.turns_per_round)


class Config(Section):
    """A whole run."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    table: TableSection = TableSection()
    logged: LoggedSection = LoggedSection()
    sample: SampleSection = SampleSection()
    llm: LLMSection = LLMSection()
    bootstrap: BootstrapSection = BootstrapSection()
    prompt: PromptSection = PromptSection()
    openai: OpenAISection = OpenAISection()
    texts: TextsSection = TextsSection()
    generate: GenerateSection = GenerateSection()
    encoder: EncoderSection = EncoderSection()
    reranker: RerankerSection = RerankerSection()
    reward: RewardSection = RewardSection()
    pair: PairSection = PairSection()
    policy: PolicySection = PolicySection()
    dpo: DPOSection = DPOSection()
    best_of_n: BestOfNSection = BestOfNSection()
    grpo: GRPOSection = GRPOSection()
    evaluate: EvaluateSection = EvaluateSection()
    serving: ServingSection = ServingSection()

    @property
    def has_policy(self) -> bool:
        """Whether an LLM writes the texts, which can be trained; other sources are only sampled."""
        return self.llm.source == "vllm"

    @property
    def test_texts(self) -> int:
        """Texts that are written for each test user: several where they are drawn."""
        return self.evaluate.num_texts if self.llm.source in ("vllm", "openai") else 1

    @property
    def like_at(self) -> float | None:
        """The least rating of what prompts and counted texts call liked; None for implicit feedback: everything is."""
        return self.data.positive_rating if self.prompt.ratings else None

    @property
    def evaluated_backbones(self) -> tuple[str, ...]:
        """The backbones that `evaluate` trains and measures."""
        return self.evaluate.backbones or (self.reranker.backbone,)

    @property
    def counted_texts(self) -> tuple[str, ...]:
        """Subjects of the artifact `references`: texts that are counted beside those of `llm.source`."""
        read = "statistics" in self.reward.reader or bool(self.evaluate.references)
        return ("statistics",) * (read and self.llm.source != "statistics") + ("oracle",) * self.reward.oracle

    @property
    def reads_own_texts(self) -> bool:
        """Whether the reward's rerankers are trained on the texts of `llm.source`."""
        return self.run.max_rounds > 0 and not {"llm", self.llm.source}.isdisjoint(self.reward.reader)

    def generate_by(self, policy: int) -> GenerateSection:
        """The section as it holds for texts of a policy, 0 the base LLM: with the one temperature of its round."""
        temperature = self.generate.temperature
        if not isinstance(temperature, tuple):
            return self.generate
        rounds_before = policy // self.run.turns_per_round
        own = temperature[min(rounds_before, len(temperature) - 1)]
        return self.generate.model_copy(update={"temperature": own})

    def reference_of(self, turn: int) -> int:
        """The number of the policy that is the reference of a turn's training; 0 is the base LLM."""
        chosen = self.policy.reference_policy
        if chosen == "turn":
            return turn - 1
        return 0 if chosen == "base" else self.run.first_turn(turn) - 1

    @property
    def max_training_tokens(self) -> int:
        """Most tokens of a prompt and a text that are trained on."""
        return self.policy.max_length or self.llm.max_model_len

    def section_hash(self, *parts: str) -> str:
        """Hash of `section_values`."""
        chosen = self.section_values(*parts)
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]

    def section_values(self, *parts: str) -> dict[str, Any]:
        """The run seed ("seed") and the values of the named parts, as JSON has them: what a stage's output depends on.

        A part is "section" (all of its keys but those of placement), "section.key", or "-section.key", which leaves a key out.
        """
        left_out = {part[1:] for part in parts if part.startswith("-")}
        chosen: dict[str, Any] = {"seed": self.run.seed}
        for part in parts:
            name, _, key = part.removeprefix("-").partition(".")
            section: Section = getattr(self, name)
            values = section.model_dump(mode="json", exclude=set(section.placement))
            if not key:
                chosen[part] = {
                    own: value for own, value in values.items() if f"{name}.{own}" not in left_out
                }
            elif not part.startswith("-"):
                chosen[part] = values[key]
        return chosen
