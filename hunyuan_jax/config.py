"""Run configuration: frozen dataclasses, their locked ConfigDict form for recipes, and every check
that needs no device.

Imports no jax, so that a misspelled key is answered before anything slow is loaded.  A recipe in
`configs/` builds a `Config` and returns `to_config_dict(config)`; `from_config_dict` turns the
(possibly overridden) ConfigDict back into the frozen form and `validate`s it.  From there on each
function receives the smallest piece it needs.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from hunyuan_jax.errors import ConfigError

Dispatch = Literal["recycle", "drop", "dropless"]
Remat = Literal["none", "dots", "full"]
RopeType = Literal["default", "plain", "alpha", "linear"]
Dtype = Literal["float32", "bfloat16"]
StateDtype = Literal["float32", "bfloat16", "fp8_lm"]
ObjectiveName = Literal["pretrain"]
ScheduleName = Literal["three_phase", "cosine_with_min_lr"]


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts; `num_experts == 1` is the dense model (specification section 2)."""

    num_experts: int = 1
    top_k: int = 1
    # whether the weights of a token's k experts are its probabilities over their sum; else
    # as they are
    norm_topk_prob: bool = False
    num_shared_experts: int = (
        0  # one fused MLP of this many times intermediate_size, always on, weight 1
    )
    dispatch: Dispatch = "dropless"
    capacity_factor: float = 1.0
    min_capacity: int = 1
    group_size: int = 0  # tokens that share one capacity budget; 0 = one sequence
    aux_loss_weight: float = 0.0
    z_loss_weight: float = 0.0


LORA_TARGETS = (
    "q",
    "k",
    "v",
    "o",
    "gate",
    "up",
    "down",
    "expert_gate",
    "expert_up",
    "expert_down",
)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Fine-tuning by adapters of low rank on some projections; everything else is frozen."""

    rank: int = 0  # 0 = off: all parameters are trained
    alpha: float = 16.0  # see `scale`
    # The projections that have one, of LORA_TARGETS; gate, up, down: of a dense layer and the
    # shared expert, expert_...: of routed experts.
    targets: tuple[str, ...] = ("q", "k", "v", "o")

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture and how it is computed; numbers of released models live in presets.py."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float = 1e-5
    rope_type: RopeType = "alpha"  # "default" has exact frequencies, "plain" and "linear" bfloat16 ones like Hunyuan-Large's code
    rope_theta: float = 10_000.0
    rope_alpha: float = 1_000.0  # rope_type "alpha" only
    rope_factor: float = 1.0  # rope_type "linear" only
    cla_share_factor: int = 1  # layers that share one K/V; 1 = no cross-layer attention
    use_qk_norm: bool = True
    attention_bias: bool = False
    tie_embeddings: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    init_std: float = 0.02
    pad_token_id: int = -1  # this row of the embedding gets no gradient from the lookup; -1 = none
    bos_token_id: int = -1
    eos_token_ids: tuple[int, ...] = ()
    dtype: Dtype = "float32"  # activations and matmuls; parameters are float32 masters
    remat: Remat = "none"
    kernels: str = "auto"  # or the implementations to take, the first that can: "pallas_tpu", "pallas_gpu,xla", "reference", ...
    moe: MoeConfig = MoeConfig()
    lora: LoraConfig = LoraConfig()

    @property
    def is_moe(self) -> bool:
        """Whether the layers hold routed experts."""
        return self.moe.num_experts > 1

    @property
    def num_groups(self) -> int:
        """Number of CLA groups: the scan length and the number of KV cache entries."""
        return self.num_layers // self.cla_share_factor


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, 'what is left'.

    num_slices is no axis: it says how many slices, joined by the data centre's network, the
    devices form; `replica` spans them.
    """

    replica: int = 1
    data: int = -1
    expert: int = 1
    tensor: int = 1
    num_slices: int = 1


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    name: str
    path: str  # as data.source


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """A part of the run and the shares of the sources in it."""

    name: str
    weights: tuple[
        float, ...
    ]  # one for each of data.sources, in their order; only their ratios count
    start: float = 0.0  # share of train.num_steps after which the phase begins


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text sources and tokenizer (docs/data.md)."""

    source: str = "stdlib"  # "stdlib"; a folder, file or glob of text; or a folder made by `python -m hunyuan_jax tokenize`
    sources: tuple[SourceConfig, ...] = ()  # a mixture, instead of source
    phases: tuple[PhaseConfig, ...] = ()  # of a mixture, in order
    tokenizer: str = (
        "byte"  # "byte", or the path of a model folder, a tokenizer.json or a tiktoken ranks file
    )
    text_field: str = (
        "text"  # the field of a .jsonl row, or column of a .parquet file, that holds the text
    )
    validation_fraction: float = 0.02  # share of the documents held out, of each source
    max_bad_fraction: float = (
        0.01  # share of unusable rows (of at least 1000) above which the run stops
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with parameter groups."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only: norms, biases and embeddings are not decayed
    max_grad_norm: float = 1.0
    state_dtype: StateDtype = (
        "float32"  # master weight + two moments: 12, 8 (bf16 moments) or 5 bytes a parameter
    )
    expert_lr_ratio: float = 0.31  # specialised experts against everything else, paper section 3.2
    # skip a step whose gradient norm is above this many times the running mean; 0 = only if
    # not finite
    spike_factor: float = 0.0
    spike_after: int = 100  # accepted steps before spike_factor acts


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run (reference/papers.md 1.7; specification section 8)."""

    name: ScheduleName = "three_phase"
    peak_lr: float = 3e-4
    warmup_steps: int = 100
    decay_ratio: float = 0.3  # three_phase: share of the peak where the long decay ends
    anneal_fraction: float = 0.05  # three_phase: last share of the run
    anneal_ratio: float = 0.1  # three_phase: share of the peak reached at the end
    min_lr: float = 0.0  # cosine_with_min_lr: absolute


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    num_steps: int = 1000
    batch_size: int = 8  # sequences a step over all hosts
    seq_len: int = 256
    init_from: str = ""  # start from these weights: a model folder or the workdir of a run; "" = drawn from `seed`
    grad_accum_steps: int = 1  # equal parts of the batch, one after another, before each update
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8
    # skipped in a row (loss or gradient not finite, or optimizer.spike_factor): stop the run
    max_skipped_steps: int = 20
    watchdog_minutes: float = (
        30.0  # without a finished step: write the stacks of all threads; 0 = never
    )
    profile_steps: str = ""  # "10:13" traces steps 10, 11, 12 and 13 into DIR/profile; "" = none
    wandb_project: str = ""  # also log to this project of Weights & Biases (needs wandb); "" = no

    @property
    def profiled(self) -> range:
        """The steps of profile_steps."""
        first, _, last = (self.profile_steps or "1:0").partition(":")
        return range(int(first), int(last) + 1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, and where a second copy goes.

    What `keep`, `keep_every` and `keep_best` each ask for is kept.
    """

    every: int = 100  # steps; 0 = by every_minutes alone
    # also when so much time has passed since the last save, looked at every train.log_every
    # steps; 0 = never
    every_minutes: float = 0.0
    keep: int = 3  # the newest
    keep_every: int = 0  # those whose step is a multiple of this; 0 = none
    # those with the lowest validation loss; a new lowest is saved when it is found. 0 = none
    keep_best: int = 1
    mirror: str = ""  # finished checkpoints are copied to this fsspec URL, such as gs://BUCKET/RUN, and come back from there; "" = no copy


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What the run minimises."""

    name: ObjectiveName = "pretrain"


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    objective: ObjectiveConfig = ObjectiveConfig()


def to_config_dict(config: Config) -> ConfigDict:
    """The locked ConfigDict of a recipe; every field can be overridden, none can be added."""
    return ConfigDict(dataclasses.asdict(config)).lock()


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of any config dataclass, as written to config.json."""
    return dataclasses.asdict(config)


def flat_fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of a nested dict, such as that of `to_dict`."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def from_config_dict(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Strict conversion to the frozen form.

    Raises:
      ConfigError: unknown key (naming the nearest), wrong type, or a combination `validate`
        refuses.
    """
    return validate(
        from_dict(Config, config.to_dict() if isinstance(config, ConfigDict) else config)
    )


def from_dict(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Builds the dataclass `cls` from a nested mapping; unknown keys and wrong types are errors."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(
                unknown_key_message(prefix + key, [prefix + name for name in fields])
            )
        kwargs[key] = _checked(prefix + key, value, hints[key])
    missing = [
        name
        for name, f in fields.items()
        if name not in kwargs
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(
            f"config.{prefix}{missing[0]} is missing; it has no default. Set it in the recipe."
        )
    return cls(**kwargs)


def unknown_key_message(key: str, known: list[str]) -> str:
    """One line for an unknown config key, with the nearest known one."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"config.{key} does not exist. Did you mean config.{nearest[0]}?"


def field_names(cls: type = Config, prefix: str = "") -> list[str]:
    """All leaf field paths, such as 'model.moe.top_k'."""
    names = []
    for f in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[f.name]
        names += (
            field_names(hint, f"{prefix}{f.name}.")
            if dataclasses.is_dataclass(hint)
            else [prefix + f.name]
        )
    return names


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type; int is accepted for float and a list for a tuple, nothing
    else is converted.
    """
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(
                f"config.{name} = {value!r} is not one of "
                f"{', '.join(map(repr, typing.get_args(hint)))}."
            )
        return value
    if origin is tuple and isinstance(value, tuple | list):
        return tuple(
            _checked(f"{name}[{i}]", v, typing.get_args(hint)[0]) for i, v in enumerate(value)
        )
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"config.{name} = {value!r} must be a section of fields.")
        return from_dict(hint, value, f"{name}.")
    if hint is float and type(value) is int:
        return float(value)
    expected = origin or hint
    if isinstance(expected, types.UnionType) or type(value) is not expected:
        raise ConfigError(
            f"config.{name} = {value!r} is a {type(value).__name__}; it must be a "
            f"{expected.__name__}."
        )
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"config.{name} = {value} must be finite.")
    return value


def validate(config: Config) -> Config:
    """Returns `config` unchanged, or raises ConfigError for what no machine could run."""
    validate_model(config.model)
    _validate_mesh(config)
    _validate_run(config)
    return config


def validate_model(m: ModelConfig) -> ModelConfig:
    """Checks the architecture alone (used for model folders too)."""
    sizes = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim max_position cla_share_factor"
    for name in sizes.split():
        _require(
            getattr(m, name) >= 1, f"config.model.{name} = {getattr(m, name)} must be at least 1."
        )
    _require(
        m.num_heads % m.num_kv_heads == 0,
        f"config.model.num_heads = {m.num_heads} is not divisible by num_kv_heads = "
        f"{m.num_kv_heads}; "
        "each K/V head serves an equal share of the query heads. Use num_kv_heads from "
        f"{_divisors(m.num_heads)}.",
    )
    _require(
        m.head_dim % 2 == 0,
        f"config.model.head_dim = {m.head_dim} must be even: RoPE rotates it in halves.",
    )
    _require(
        m.num_layers % m.cla_share_factor == 0,
        f"config.model.num_layers = {m.num_layers} is not divisible by cla_share_factor = "
        f"{m.cla_share_factor}; "
        f"layers share K/V in whole groups. Use a share factor from {_divisors(m.num_layers)}.",
    )
    if m.rope_type == "alpha":
        _require(
            m.rope_alpha > 0,
            f"config.model.rope_alpha = {m.rope_alpha} must be positive (1.0 leaves the base as "
            "it is).",
        )
        _require(
            m.head_dim > 2,
            f"config.model.head_dim = {m.head_dim} must be above 2 for rope_type 'alpha'.",
        )
    if m.rope_type == "linear":
        _require(
            m.rope_factor > 0, f"config.model.rope_factor = {m.rope_factor} must be positive."
        )
    for name in ("attention_dropout", "hidden_dropout"):
        _require(
            0 <= getattr(m, name) < 1,
            f"config.model.{name} = {getattr(m, name)} must be in [0, 1).",
        )
    _require(
        -1 <= m.pad_token_id < m.vocab_size,
        f"config.model.pad_token_id = {m.pad_token_id} is outside the vocabulary of "
        f"{m.vocab_size}.",
    )
    _validate_moe(m.moe)
    _validate_lora(m)
    return m


def _validate_lora(m: ModelConfig) -> None:
    lora = m.lora
    _require(
        lora.rank >= 0,
        f"config.model.lora.rank = {lora.rank} must not be negative; 0 trains all parameters.",
    )
    _require(lora.alpha > 0, f"config.model.lora.alpha = {lora.alpha} must be positive.")
    _require(
        0 < len(lora.targets) == len(set(lora.targets)) and set(lora.targets) <= set(LORA_TARGETS),
        f"config.model.lora.targets = {lora.targets} must name projections, each once: "
        f"{', '.join(LORA_TARGETS)}.",
    )
    for targets, is_there, module in (
        (("gate", "up", "down"), not m.is_moe or m.moe.num_shared_experts > 0, "shared expert"),
        (("expert_gate", "expert_up", "expert_down"), m.is_moe, "routed experts"),
    ):
        wrong = [target for target in lora.targets if target in targets]
        _require(
            is_there or not wrong,
            f"config.model.lora.targets names {', '.join(wrong)}, but the model has no {module}; "
            "leave it out.",
        )


def _validate_moe(moe: MoeConfig) -> None:
    _require(
        moe.num_experts >= 1,
        f"config.model.moe.num_experts = {moe.num_experts} must be at least 1 (1 = dense).",
    )
    _require(
        1 <= moe.top_k <= moe.num_experts,
        f"config.model.moe.top_k = {moe.top_k} must be between 1 and num_experts = "
        f"{moe.num_experts}.",
    )
    _require(
        moe.num_shared_experts >= 0,
        f"config.model.moe.num_shared_experts = {moe.num_shared_experts} must not be negative.",
    )
    _require(
        moe.num_experts > 1 or moe.num_shared_experts == 0,
        f"config.model.moe.num_shared_experts = {moe.num_shared_experts} needs num_experts > 1; "
        "the dense model has one MLP.",
    )
    _require(
        moe.capacity_factor > 0,
        f"config.model.moe.capacity_factor = {moe.capacity_factor} must be positive.",
    )
    _require(
        moe.min_capacity >= 1,
        f"config.model.moe.min_capacity = {moe.min_capacity} must be at least 1.",
    )
    _require(
        moe.group_size >= 0,
        f"config.model.moe.group_size = {moe.group_size} must be a token count, or 0 for one "
        "sequence.",
    )
    for name in ("aux_loss_weight", "z_loss_weight"):
        _require(
            getattr(moe, name) >= 0,
            f"config.model.moe.{name} = {getattr(moe, name)} must not be negative.",
        )


def _validate_mesh(config: Config) -> None:
    sizes = dataclasses.asdict(config.mesh)
    num_slices = sizes.pop("num_slices")
    _require(
        num_slices >= 1,
        f"config.mesh.num_slices = {num_slices} must be at least 1; 1 is a single slice, or no "
        "TPU.",
    )
    for name, size in sizes.items():
        _require(
            size >= 1 or size == -1,
            f"config.mesh.{name} = {size} must be at least 1, or -1 for what is left.",
        )
    num_experts, expert = config.model.moe.num_experts, config.mesh.expert
    _require(
        expert == -1 or num_experts % expert == 0,
        f"config.model.moe.num_experts = {num_experts} does not divide over config.mesh.expert = "
        f"{expert}; "
        f"each shard holds an equal share. Use a mesh.expert from {_divisors(num_experts)}.",
    )
    left = [name for name, size in sizes.items() if size == -1]
    _require(
        len(left) <= 1,
        f"config.mesh has -1 ('what is left') for {' and '.join(left)}; only one axis may take "
        "it.",
    )


def _validate_run(config: Config) -> None:
    train, schedule, moe = config.train, config.schedule, config.model.moe
    for section, names in {
        "train": "num_steps batch_size seq_len grad_accum_steps log_every eval_every eval_batches "
        "max_skipped_steps",
        "checkpoint": "keep",
        "optimizer": "spike_after",
    }.items():
        for name in names.split():
            value = getattr(getattr(config, section), name)
            _require(value >= 1, f"config.{section}.{name} = {value} must be at least 1.")
    for section, names in {
        "train": "watchdog_minutes",
        "checkpoint": "every every_minutes keep_every keep_best",
    }.items():
        for name in names.split():
            value = getattr(getattr(config, section), name)
            _require(
                value >= 0, f"config.{section}.{name} = {value} must not be negative; 0 is off."
            )
    _require(
        config.checkpoint.every > 0 or config.checkpoint.every_minutes > 0,
        "config.checkpoint.every = 0 and config.checkpoint.every_minutes = 0.0 would save nothing "
        "before the end; set one of them.",
    )
    _require(
        config.optimizer.spike_factor == 0 or config.optimizer.spike_factor > 1,
        f"config.optimizer.spike_factor = {config.optimizer.spike_factor} must be above 1 (times "
        "the mean norm), or 0 for no limit.",
    )
    _require(
        not train.profile_steps
        or (
            re.fullmatch(r"[1-9]\d*:[1-9]\d*", train.profile_steps) is not None
            and len(train.profiled) > 0
        ),
        f"config.train.profile_steps = {train.profile_steps!r} must be FIRST:LAST, such as 10:13 "
        "for steps 10, 11, 12 and 13.",
    )
    _require(
        train.seq_len <= config.model.max_position,
        f"config.train.seq_len = {train.seq_len} is above config.model.max_position = "
        f"{config.model.max_position}.",
    )
    _require(
        train.batch_size % train.grad_accum_steps == 0,
        f"config.train.batch_size = {train.batch_size} does not split into "
        f"config.train.grad_accum_steps = {train.grad_accum_steps} equal "
        f"parts. Use a grad_accum_steps from {_divisors(train.batch_size)}.",
    )
    if config.model.is_moe and moe.group_size:
        tokens = train.batch_size // train.grad_accum_steps * train.seq_len
        _require(
            train.seq_len % moe.group_size == 0
            or (moe.group_size % train.seq_len == 0 and tokens % moe.group_size == 0),
            f"config.model.moe.group_size = {moe.group_size} must divide config.train.seq_len = "
            f"{train.seq_len}, "
            f"or be a multiple of it that divides the {tokens} tokens of a batch (of one part of "
            "it, with grad_accum_steps).",
        )
    _require(
        schedule.peak_lr > 0, f"config.schedule.peak_lr = {schedule.peak_lr} must be positive."
    )
    _require(
        0 <= schedule.warmup_steps <= train.num_steps,
        f"config.schedule.warmup_steps = {schedule.warmup_steps} must be between 0 and "
        f"config.train.num_steps = {train.num_steps}.",
    )
    if schedule.name == "three_phase":
        for name in ("decay_ratio", "anneal_fraction", "anneal_ratio"):
            _require(
                0 <= getattr(schedule, name) <= 1,
                f"config.schedule.{name} = {getattr(schedule, name)} must be between 0 and 1.",
            )
        _require(
            schedule.anneal_fraction == 0 or schedule.anneal_ratio <= schedule.decay_ratio,
            f"config.schedule.anneal_ratio = {schedule.anneal_ratio} is above decay_ratio = "
            f"{schedule.decay_ratio}: annealing must not "
            "raise the learning rate. Lower anneal_ratio, or set anneal_fraction = 0 for no "
            "annealing.",
        )
    _require(
        0 <= schedule.min_lr <= schedule.peak_lr,
        f"config.schedule.min_lr = {schedule.min_lr} must be between 0 and peak_lr = "
        f"{schedule.peak_lr}; it is absolute, not a ratio.",
    )
    for name in ("expert_lr_ratio", "max_grad_norm", "eps"):
        value = getattr(config.optimizer, name)
        _require(value > 0, f"config.optimizer.{name} = {value} must be positive.")
    _validate_data(config.data)


def _validate_data(data: DataConfig) -> None:
    for name in ("validation_fraction", "max_bad_fraction"):
        _require(
            0 <= getattr(data, name) < 1,
            f"config.data.{name} = {getattr(data, name)} must be in [0, 1).",
        )
    names, starts = (
        [source.name for source in data.sources],
        [phase.start for phase in data.phases],
    )
    _require(
        len(set(names)) == len(names) and "" not in names,
        f"config.data.sources are named {names}; names must differ and not be empty.",
    )
    _require(
        bool(names) == bool(starts),
        f"config.data has {len(names)} sources and {len(starts)} phases; a mixture needs both "
        "(one phase is enough), config.data.source "
        "alone needs neither.",
    )
    _require(
        not names or data.source == DataConfig.source,
        f"config.data.source = {data.source!r} and config.data.sources {names} exclude each "
        "other; list it in sources, or leave it out.",
    )
    _require(
        not starts or (starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < 1),
        f"config.data.phases start at {starts}; shares of the run must rise from 0 and stay below "
        "1.",
    )
    for phase in data.phases:
        _require(
            len(phase.weights) == len(names)
            and min(phase.weights) >= 0
            and sum(phase.weights) > 0,
            f"config.data.phases: {phase.name!r} has weights {phase.weights}; it needs one for "
            f"each of the sources {names}, none negative "
            "and not all 0.",
        )


def _require(is_ok: bool, message: str) -> None:
    if not is_ok:
        raise ConfigError(message)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
