"""policy.objective -> what the policy learns from a round's scored texts."""

from __future__ import annotations

from dpo4rec_ray.train.best_of_n import BestOfNLearner
from dpo4rec_ray.train.dpo import DPOLearner
from dpo4rec_ray.train.grpo import GRPOLearner
from dpo4rec_ray.train.policy_task import Learner

# The names are those of the stages and of the sections in the recipe too.
LEARNERS: dict[str, Learner] = {"dpo": DPOLearner(), "best_of_n": BestOfNLearner(), "grpo": GRPOLearner()}
