"""The configuration: strict keys and types, every rule, a meaning for each field, the round trip
of a recipe, and no jax before it is needed.
"""

import ast
import dataclasses
import functools
import inspect
import json
import re
import subprocess
import sys
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_jax import config as config_lib
from hunyuan_jax import presets
from hunyuan_jax.config import (
    Config,
    LoraConfig,
    MeshConfig,
    MoeConfig,
    PhaseConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
    data,
    field_names,
    flat_fields,
    from_config_dict,
    from_dict,
    mesh,
    model,
    optim,
    post,
    quarter_long,
    run,
    section,
    to_config_dict,
    to_dict,
    train,
    unknown_key_message,
    without_effect,
)
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import AnyPath, LocalPath
from support import paths

ROOT = paths.ROOT
BASE = Config(model=presets.tiny(), train=TrainConfig(num_steps=200))


def with_values(config=BASE, **changes):
    """The config with fields changed, each section at once; a double underscore is a dot."""
    sections = {}
    for path, value in changes.items():
        head, _, rest = path.partition("__")
        sections.setdefault(head, {})[rest] = value
    return dataclasses.replace(
        config,
        **{
            head: inner[""] if "" in inner else with_values(getattr(config, head), **inner)
            for head, inner in sections.items()
        },
    )


def online(**changes):
    """A run whose pairs are written by the policy."""
    changes = {"share": 0.5, "endpoint": "http://localhost", "max_new_tokens": 9, **changes}
    fields = {f"objective__dpo__online__{name}": value for name, value in changes.items()}
    return {"objective__name": "dpo", "model__moe__dispatch": "dropless", **fields}


def test_a_mixture_survives_recipe_and_json():
    config = with_values(**mixture())
    assert from_config_dict(to_config_dict(config)) == config
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_quarter_of_the_rows_is_long():
    data = quarter_long("corpus", long_from=100, tokenizer="byte")
    limits = [(x.path, x.min_tokens, x.max_tokens) for x in data.sources]
    assert limits == [("corpus", 100, 0), ("corpus", 0, 99)]
    assert (data.tokenizer, data.phases[0].weights) == ("byte", (0.25, 0.75))


# Keys


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("train", "num_step", "train.num_steps"),
        ("model", "hiden_size", "model.hidden_size"),
        ("model.moe", "capacity_facter", "model.moe.capacity_factor"),
        ("", "trian", "train"),
        ("mesh", "experts", "mesh.expert"),
    ],
)
def test_an_unknown_key_names_the_nearest(section, key, nearest):
    values = to_dict(BASE)
    inner = values
    for name in filter(None, section.split(".")):
        inner = inner[name]
    inner[key] = 1
    full = f"{section}.{key}".lstrip(".")
    with pytest.raises(
        ConfigError,
        match=rf"^config\.{re.escape(full)} does not exist\. Did you mean "
        rf"config\.{re.escape(nearest)}\?$",
    ):
        from_config_dict(values)


def test_the_nearest_key_may_be_in_another_section():
    assert unknown_key_message("model.capacity_factor", field_names()).endswith(
        "Did you mean config.model.moe.capacity_factor?"
    )


def test_a_missing_field_without_default_is_named():
    values = to_dict(BASE)
    del values["model"]["vocab_size"]
    with pytest.raises(
        ConfigError, match=r"^config\.model\.vocab_size is missing; .* Set it in the recipe\.$"
    ):
        from_config_dict(values)
    with pytest.raises(ConfigError, match=r"^config\.model is missing"):
        from_config_dict({})


def test_a_section_must_be_a_mapping():
    with pytest.raises(ConfigError, match=r"^config\.train = 3 must be a section of fields\.$"):
        from_config_dict(to_dict(BASE) | {"train": 3})


# Types


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.num_steps", 1.5, "config.train.num_steps = 1.5 is a float; it must be an int."),
        ("train.num_steps", True, "config.train.num_steps = True is a bool; it must be an int."),
        ("train.num_steps", "100", "config.train.num_steps = '100' is a str; it must be an int."),
        (
            "train.num_steps",
            None,
            "config.train.num_steps = None is a NoneType; it must be an int.",
        ),
        ("model.use_qk_norm", 1, "config.model.use_qk_norm = 1 is an int; it must be a bool."),
        (
            "model.rope_alpha",
            "1e3",
            "config.model.rope_alpha = '1e3' is a str; it must be a float.",
        ),
        (
            "model.rope_alpha",
            True,
            "config.model.rope_alpha = True is a bool; it must be a float.",
        ),
        ("model.rope_alpha", float("nan"), "config.model.rope_alpha = nan must be finite."),
        ("schedule.peak_lr", float("inf"), "config.schedule.peak_lr = inf must be finite."),
        ("data.source", 3, "config.data.source = 3 is an int; it must be a str."),
        (
            "model.moe.dispatch",
            "recycled",
            "config.model.moe.dispatch = 'recycled' is not one of 'recycle', 'drop', 'dropless'.",
        ),
        (
            "objective.name",
            "pretraining",
            "config.objective.name = 'pretraining' is not one of 'pretrain', 'sft', 'dpo', "
            "'grpo', 'distill'.",
        ),
        (
            "model.dtype",
            "float16",
            "config.model.dtype = 'float16' is not one of 'float32', 'bfloat16'.",
        ),
        ("model.remat", True, "config.model.remat = True is not one of 'none', 'dots', 'full'."),
        (
            "model.eos_token_ids",
            5,
            "config.model.eos_token_ids = 5 is an int; it must be a tuple.",
        ),
        (
            "model.eos_token_ids",
            (1, 2.0),
            "config.model.eos_token_ids[1] = 2.0 is a float; it must be an int.",
        ),
        ("data.sources", ("a",), "config.data.sources[0] = 'a' must be a section of fields."),
        (
            "data.sources",
            ({"name": "a", "path": 1},),
            "config.data.sources[0].path = 1 is an int; it must be a str.",
        ),
        (
            "data.sources",
            ({"name": "a", "pth": ""},),
            "config.data.sources[0].pth does not exist. Did you mean config.data.sources[0].path?",
        ),
        (
            "data.phases",
            ({"name": "a"},),
            "config.data.phases[0].weights is missing; it has no default. Set it in the recipe.",
        ),
    ],
)
def test_a_wrong_type_is_refused_with_field_value_and_rule(path, value, message):
    values = to_dict(BASE)
    *sections, name = path.split(".")
    inner = values
    for part in sections:
        inner = inner[part]
    inner[name] = value
    with pytest.raises(ConfigError) as caught:
        from_config_dict(values)
    assert str(caught.value) == message


def test_an_int_is_a_float_and_a_list_a_tuple():
    values = to_dict(BASE)
    values["model"]["rope_alpha"], values["model"]["eos_token_ids"] = 7, [257, 258]
    model = from_config_dict(values).model
    assert (model.rope_alpha, type(model.rope_alpha), model.eos_token_ids) == (
        7.0,
        float,
        (257, 258),
    )


# The round trip


def recipes():
    return sorted((ROOT / "configs").glob("*.py"))


def load_recipe(path):
    namespace = {}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    return namespace["get_config"]()


@pytest.mark.parametrize("name", ["tiny", "bench", "a13b", "a52b"])
def test_a_config_survives_its_config_dict(name):
    config = with_values(Config(model=getattr(presets, name)()), train__seq_len=128)
    recipe = to_config_dict(config)
    assert recipe.is_locked
    assert from_config_dict(recipe) == config  # as it is
    assert from_config_dict(recipe.to_dict()) == config  # and as the command line hands it over
    assert to_dict(from_config_dict(recipe)) == recipe.to_dict()


def test_a_recipe_takes_overrides_and_no_new_keys():
    recipe = to_config_dict(BASE)
    recipe.model.moe.capacity_factor = 1.25
    assert from_config_dict(recipe) == with_values(model__moe__capacity_factor=1.25)
    with pytest.raises(AttributeError, match="capacity_facter"):
        recipe.model.moe.capacity_facter = 1.25


def with_the_tiny_model(recipe):
    """Fills in what a recipe leaves open, in place of `train.start.complete`."""
    open_fields, base = dict(flat_fields(recipe)), dict(flat_fields(to_dict(BASE)))
    nested = {}
    for name, value in open_fields.items():
        *sections, field = name.split(".")
        inner = functools.reduce(lambda d, part: d.setdefault(part, {}), sections, nested)
        inner[field] = base[name] if value is None else value
    return nested


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    recipe = load_recipe(path)
    config = from_config_dict(recipe, with_the_tiny_model)
    assert without_effect(config) == []
    found = dict(flat_fields(to_dict(config)))
    said = {name: v for name, v in flat_fields(recipe.to_dict()) if v is not None}
    assert said == {name: found[name] for name in said}
    left_open = found.keys() - said.keys()
    assert not left_open or {"model.vocab_size", "data.tokenizer", "train.seq_len"} <= left_open


def test_frozen_all_the_way_down():
    for part, name in (
        (BASE, "model"),
        (BASE.model, "num_layers"),
        (BASE.model.moe, "top_k"),
        (BASE.train, "seed"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, None)


def test_the_contract_has_its_fields():
    # The names that scripts outside the repository use.
    names = (
        "train.num_steps train.batch_size train.seq_len train.seed train.log_every "
        "checkpoint.every checkpoint.keep mesh.replica mesh.data"
    )
    names += (
        " mesh.expert mesh.tensor model.moe.dispatch model.moe.capacity_factor "
        "model.moe.group_size optimizer.expert_lr_ratio"
    )
    names += " model.dtype data.source objective.name"
    assert set(names.split()) <= set(field_names())
    assert {name.split(".")[0] for name in field_names()} == {
        "model",
        "mesh",
        "data",
        "optimizer",
        "schedule",
        "train",
        "checkpoint",
        "objective",
    }


def test_derived_figures():
    assert (BASE.model.is_moe, BASE.model.num_groups) == (True, 2)
    assert (presets.a52b().num_groups, presets.a13b().num_groups) == (32, 32)
    assert not dataclasses.replace(BASE.model, moe=MoeConfig()).is_moe


# The rules


def mixture(names="ab", weights=(1.0, 2.0), starts=(0.0, 0.5)):
    return {
        "data__sources": tuple(SourceConfig(name, "folder") for name in names),
        "data__phases": tuple(
            PhaseConfig(f"phase {i}", weights, start) for i, start in enumerate(starts)
        ),
    }


# (changes, what the message holds).  Each line breaks one rule; a test below checks that none is
# missing.
# A dense model of Spark layers, and latent attention, where a rule is about either.
SPARK = {"model__moe": MoeConfig(), "model__spark__neuron_share": 0.1}
LATENT = {"model__latent__width": 256, "model__use_qk_norm": False, "model__num_kv_heads": 4}
BROKEN = [
    *(
        ({f"model__{name}": 0}, f"config.model.{name} = 0 must be at least 1")
        for name in ("vocab_size", "num_layers", "cla_share_factor")
    ),
    *(
        ({f"model__{name}": -4}, f"config.model.{name} = -4 must be at least 1")
        for name in ("hidden_size", "intermediate_size", "num_heads")
    ),
    *(
        ({f"model__{name}": 0}, f"config.model.{name} = 0 must be at least 1")
        for name in ("num_kv_heads", "head_dim", "max_position")
    ),
    (
        {"model__num_kv_heads": 3},
        "num_heads = 4 is not divisible by num_kv_heads = 3; .* Use num_kv_heads from [1, 2, 4].",
    ),
    ({"model__head_dim": 15}, "head_dim = 15 must be even"),
    (
        {"model__cla_share_factor": 3},
        "num_layers = 4 is not divisible by cla_share_factor = 3; .* from [1, 2, 4].",
    ),
    ({"model__rope_alpha": 0.0}, "rope_alpha = 0.0 must be positive"),
    ({"model__head_dim": 2}, "head_dim = 2 must be above 2 for rope_type 'alpha'"),
    (
        {"model__rope_type": "linear", "model__rope_factor": 0.0},
        "rope_factor = 0.0 must be positive",
    ),
    ({"model__attention_dropout": 1.0}, "attention_dropout = 1.0 must be in [0, 1)"),
    ({"model__hidden_dropout": -0.1}, "hidden_dropout = -0.1 must be in [0, 1)"),
    ({"model__pad_token_id": 320}, "pad_token_id = 320 is outside the vocabulary of 320"),
    ({"model__pad_token_id": -2}, "pad_token_id = -2 is outside the vocabulary"),
    ({"model__moe__num_experts": 0}, "num_experts = 0 must be at least 1 (1 = dense)"),
    ({"model__moe__top_k": 9}, "top_k = 9 must be between 1 and num_experts = 8"),
    ({"model__moe__top_k": 0}, "top_k = 0 must be between 1 and num_experts = 8"),
    ({"model__moe__num_shared_experts": -1}, "num_shared_experts = -1 must not be negative"),
    ({"model__moe__num_experts": 1}, "num_shared_experts = 1 needs num_experts > 1"),
    (
        {"model__lora__rank": -1},
        "config.model.lora.rank = -1 must not be negative; 0 trains all parameters",
    ),
    ({"model__lora__alpha": 0.0}, "config.model.lora.alpha = 0.0 must be positive"),
    *(
        ({"model__lora__targets": targets}, "must name projections, each once: q, k, v, o, gate")
        for targets in (("q", "experts"), ("q", "q"), ())
    ),
    (
        {"model__lora__targets": ("q", "gate"), "model__moe__num_shared_experts": 0},
        "targets names gate, but the model has no shared expert",
    ),
    (
        {"model__moe": MoeConfig(), "model__lora__targets": ("expert_up",)},
        "names expert_up, but the model has no routed experts",
    ),
    ({"model__moe__capacity_factor": 0.0}, "capacity_factor = 0.0 must be positive"),
    ({"model__moe__min_capacity": 0}, "min_capacity = 0 must be at least 1"),
    ({"model__moe__group_size": -1}, "group_size = -1 must be a token count, or 0"),
    ({"model__moe__aux_loss_weight": -0.5}, "aux_loss_weight = -0.5 must not be negative"),
    ({"model__moe__intermediate_size": -1}, "moe.intermediate_size = -1 must be a width"),
    ({"model__moe__routed_scale": 0.0}, "moe.routed_scale = 0.0 must be positive"),
    ({"model__moe__bias_rate": 0.1}, "moe.bias_rate = 0.1 acts on the selection bias"),
    (
        {
            "model__lora__rank": 2,
            "model__moe__selection_bias": True,
            "model__moe__bias_rate": 0.1,
        },
        "moe.bias_rate = 0.1 would change the frozen model",
    ),
    ({"model__num_dense_layers": 6}, "num_dense_layers = 6 must leave layers with experts"),
    (
        {
            "model__num_dense_layers": 1,
            "model__moe__num_experts": 1,
            "model__moe__top_k": 1,
            "model__moe__num_shared_experts": 0,
        },
        "num_dense_layers = 1 is for models with experts",
    ),
    ({"model__num_mtp_layers": 2}, "num_mtp_layers = 2 must be 0 or 1"),
    ({"model__mtp_loss_weight": 0.1}, "mtp_loss_weight = 0.1 must not be negative, and needs"),
    ({"model__num_dense_layers": 1}, "num_dense_layers = 1 is for models whose layers do not"),
    (
        {
            "model__cla_share_factor": 1,
            "model__norm_before_rope": True,
            "model__use_qk_norm": False,
        },
        "norm_before_rope is about the norms of queries and keys",
    ),
    ({"model__moe__z_loss_weight": -0.5}, "z_loss_weight = -0.5 must not be negative"),
    ({"mesh__tensor": 0}, "config.mesh.tensor = 0 must be at least 1, or -1"),
    ({"mesh__replica": -2}, "config.mesh.replica = -2 must be at least 1, or -1"),
    (
        {"mesh__num_slices": 0},
        "config.mesh.num_slices = 0 must be at least 1; 1 is a single slice",
    ),
    (
        {"mesh__expert": 3},
        "num_experts = 8 does not divide over config.mesh.expert = 3; .* Use a mesh.expert from "
        "[1, 2, 4, 8].",
    ),
    ({"mesh__expert": -1}, "-1 (all remaining devices) for data and expert; only one axis may"),
    *(
        ({f"train__{name}": 0}, f"config.train.{name} = 0 must be at least 1")
        for name in ("num_steps", "batch_size", "seq_len", "grad_accum_steps", "log_every")
    ),
    *(
        ({f"train__{name}": 0}, f"config.train.{name} = 0 must be at least 1")
        for name in ("eval_every", "eval_batches")
    ),
    ({"checkpoint__keep": 0}, "config.checkpoint.keep = 0 must be at least 1"),
    (
        {"checkpoint__every": 0},
        "config.checkpoint.every = 0 and config.checkpoint.every_minutes = 0.0 would save nothing "
        "before the end",
    ),
    *(
        (
            {f"checkpoint__{name}": -1},
            f"config.checkpoint.{name} = -1 must not be negative; 0 is off",
        )
        for name in ("every", "keep_every", "keep_best")
    ),
    (
        {"checkpoint__every_minutes": -1.0},
        "config.checkpoint.every_minutes = -1.0 must not be negative; 0 is off",
    ),
    (
        {"train__watchdog_minutes": -0.5},
        "config.train.watchdog_minutes = -0.5 must not be negative; 0 is off",
    ),
    ({"train__max_skipped_steps": 0}, "config.train.max_skipped_steps = 0 must be at least 1"),
    ({"train__ema_decay": 1.0}, "config.train.ema_decay = 1.0 must be in [0, 1); 0 is off"),
    (
        {"train__ema_decay": 0.9, "optimizer__state_dtype": "fp8_lm"},
        "config.train.ema_decay = 0.9 needs float32 weights",
    ),
    ({"objective__dpo__beta": 0.0}, "config.objective.dpo.beta = 0.0 must be positive"),
    ({"objective__dpo__label_smoothing": 0.5}, "label_smoothing = 0.5 must be in [0, 0.5)"),
    (
        {"objective__dpo__label_smoothing": 0.1, "objective__dpo__loss": "ipo"},
        "label_smoothing = 0.1 acts on loss = 'sigmoid'; it is 'ipo'",
    ),
    ({"objective__dpo__sft_weight": -1.0}, "sft_weight = -1.0 must not be negative"),
    (
        {"objective__name": "dpo", "model__moe__dispatch": "recycle"},
        "config.model.moe.dispatch = 'recycle' routes a token by what shares its batch",
    ),
    (
        {
            "objective__name": "dpo",
            "model__moe__dispatch": "dropless",
            "objective__dpo__reference": "adapter_off",
        },
        "reference = 'adapter_off' needs adapters",
    ),
    ({"model__lora__quantize": "int4"}, "without adapters all are trained; set config.model.lora"),
    (
        {"model__lora__quantize": "int4", "model__lora__rank": 2},
        "config.model.lora.quantize = 'int4' needs trained weights; set config.train.init_from",
    ),
    (
        {
            "model__lora__quantize": "int4",
            "model__lora__rank": 2,
            "model__remat": "none",
            "train__init_from": "runs/tiny",
        },
        "config.model.remat = 'none' keeps the numbers of all layers for the backward pass",
    ),
    *(
        ({f"objective__dpo__online__{name}": value}, f"config.objective.dpo.online.{message}")
        for name, value, message in (
            ("share", 1.5, "share = 1.5 must be in [0, 1]"),
            ("share", 0.5, "share = 0.5 needs one judge, and has none; set one of rewards"),
            ("endpoint", "localhost", "endpoint = 'localhost' must be a URL, such as http://"),
            ("timeout", 0.0, "timeout = 0.0 must be positive"),
            ("retries", -1, "retries = -1 must not be negative"),
            ("num_generations", 1, "num_generations = 1 must be at least 2"),
            ("length_penalty", -0.5, "length_penalty = -0.5 must not be negative"),
        )
    ),
    (
        {
            "objective__dpo__online__share": 1.0,
            "objective__dpo__online__endpoint": "http://localhost",
            "objective__dpo__online__reward_model": "runs/judge",
        },
        "needs one judge, and has reward_model and endpoint",
    ),
    *(
        ({**online(**changes)}, f"config.objective.dpo.online.{message}")
        for changes, message in (
            ({"share": 0.3}, "share = 0.3 of config.train.batch_size = 8 is 2.4 rows; take a"),
            ({"max_new_tokens": 2048}, "max_new_tokens = 2048: two answers leave no room"),
            ({"from_average": True}, "from_average = True needs a moving average; set"),
        )
    ),
    (
        {"objective__grpo__reward_weights": (1.0,)},
        "reward_weights = (1.0,) must have one weight for each of the 0 rewards",
    ),
    ({"objective__grpo__num_generations": 1}, "num_generations = 1 must be at least 2"),
    ({"objective__grpo__steps_per_rollout": 0}, "steps_per_rollout = 0 must be at least 1"),
    ({"objective__grpo__beta": -0.1}, "objective.grpo.beta = -0.1 must not be negative"),
    ({"objective__grpo__clip_low": 1.5}, "clip_low = 1.5 must be in [0, 1]"),
    ({"objective__grpo__max_ratio": 1.1}, "max_ratio = 1.1 must be at least 1 + clip_high = 1.2"),
    (
        {"objective__name": "grpo", "objective__grpo__num_generations": 3},
        "is no multiple of config.objective.grpo.num_generations = 3",
    ),
    (
        {"objective__name": "grpo", "objective__grpo__max_new_tokens": 4096},
        "max_new_tokens = 4096 leaves no room for a prompt",
    ),
    (
        {"objective__name": "grpo", "model__moe__dispatch": "recycle"},
        "config.model.moe.dispatch = 'recycle' routes a token by what shares its batch",
    ),
    (
        {
            "objective__name": "grpo",
            "model__moe__dispatch": "dropless",
            "model__hidden_dropout": 0.1,
        },
        "config.model.hidden_dropout = 0.1: with dropout the trained policy is not the one",
    ),
    ({"objective__distill__weight": 1.5}, "objective.distill.weight = 1.5 must be in [0, 1]"),
    ({"objective__distill__temperature": 0.0}, "distill.temperature = 0.0 must be positive"),
    ({"objective__distill__top_k": -1}, "distill.top_k = -1 must not be negative"),
    ({"objective__distill__hidden_weight": -1.0}, "hidden_weight = -1.0 must not be negative"),
    ({"objective__distill__inner_weight": -1.0}, "inner_weight = -1.0 must not be negative"),
    ({"objective__distill__mask_steps": 0}, "distill.mask_steps = 0 must be at least 1"),
    ({"objective__distill__inner_layers": (1, 0)}, "inner_layers = (1, 0) must name layers from"),
    ({"objective__distill__affinity_weight": -1.0}, "affinity_weight = -1.0 must not be neg"),
    ({"objective__distill__groups": (1, 0)}, "groups = (1, 0) must name groups from 0 on in asc"),
    (
        {"objective__name": "distill", "objective__distill__top_k": 1000},
        "config.objective.distill.top_k = 1000 is above config.model.vocab_size = 320",
    ),
    ({"train__num_epochs": -0.5}, "config.train.num_epochs = -0.5 must not be negative; 0 leaves"),
    (
        {**mixture(), "train__num_epochs": 1.0},
        "config.train.num_epochs = 1.0 has no meaning for a mixture",
    ),
    ({"optimizer__spike_after": 0}, "config.optimizer.spike_after = 0 must be at least 1"),
    *(
        ({"optimizer__spike_factor": factor}, f"spike_factor = {factor} must be above 1")
        for factor in (-2.0, 0.5, 1.0)
    ),
    (
        {"train__seq_len": 4096},
        "config.train.seq_len = 4096 is above config.model.max_position = 2048",
    ),
    (
        {"train__profile_steps": "13:10"},
        "config.train.profile_steps = '13:10' must be FIRST:LAST, such as 10:13 for steps 10, 11, "
        "12 and 13.",
    ),
    (
        {"train__grad_accum_steps": 3},
        "config.train.batch_size = 8 does not split into config.train.grad_accum_steps = 3 equal "
        "micro-batches. Use a grad_accum_steps from [1, 2, 4, 8].",
    ),
    (
        {"model__moe__group_size": 100},
        "group_size = 100 must divide config.train.seq_len = 256, .* divides the 2048 tokens of a "
        "batch",
    ),
    (
        {"model__moe__group_size": 768},
        "group_size = 768 must divide .* or be a multiple of it that divides the 2048 tokens",
    ),
    ({"schedule__peak_lr": 0.0}, "config.schedule.peak_lr = 0.0 must be positive"),
    (
        {"schedule__warmup_steps": 201},
        "warmup_steps = 201 must be at most config.train.num_steps = 200",
    ),
    ({"schedule__num_steps": -1}, "config.schedule.num_steps = -1 must not be negative"),
    (
        {"schedule__warmup_steps": 21, "schedule__num_steps": 20},
        "warmup_steps = 21 must be at most config.schedule.num_steps = 20",
    ),
    ({"schedule__warmup_steps": -1}, "warmup_steps = -1 must not be negative"),
    ({"schedule__decay_ratio": 1.1}, "config.schedule.decay_ratio = 1.1 must be between 0 and 1"),
    (
        {"schedule__anneal_fraction": -0.1},
        "config.schedule.anneal_fraction = -0.1 must be between 0 and 1",
    ),
    (
        {"schedule__anneal_ratio": 2.0},
        "config.schedule.anneal_ratio = 2.0 must be between 0 and 1",
    ),
    (
        {"schedule__anneal_ratio": 0.2, "schedule__decay_ratio": 0.1},
        "anneal_ratio = 0.2 is above decay_ratio = 0.1: annealing must not raise",
    ),
    (
        {"schedule__min_lr": 1.0},
        "config.schedule.min_lr = 1.0 must be between 0 and peak_lr = 0.0003; it is absolute, not "
        "a ratio",
    ),
    (
        {"optimizer__expert_lr_ratio": 0.0},
        "config.optimizer.expert_lr_ratio = 0.0 must be positive",
    ),
    ({"optimizer__max_grad_norm": 0.0}, "config.optimizer.max_grad_norm = 0.0 must be positive"),
    ({"optimizer__eps": 0.0}, "config.optimizer.eps = 0.0 must be positive"),
    (
        {"data__validation_fraction": 1.0},
        "config.data.validation_fraction = 1.0 must be in [0, 1)",
    ),
    ({"data__max_bad_fraction": -0.1}, "config.data.max_bad_fraction = -0.1 must be in [0, 1)"),
    (
        mixture(names="aa"),
        "config.data.sources are named ['a', 'a']; names must differ and not be empty",
    ),
    (mixture(names=["a", ""]), "names must differ and not be empty"),
    *(
        (
            {
                **mixture(),
                "data__sources": (SourceConfig("a", "f", *limits), SourceConfig("b", "f")),
            },
            f"config.data.sources['a'] has min_tokens = {limits[0]} and max_tokens = {limits[1]}; "
            "neither may be negative, nor the first above the second",
        )
        for limits in ((-1, 0), (9, 8))
    ),
    (mixture(starts=()), "config.data has 2 sources and 0 phases; a mixture needs both"),
    ({"data__phases": (PhaseConfig("main", (1.0,)),)}, "config.data has 0 sources and 1 phases"),
    (
        mixture() | {"data__source": "folder"},
        "config.data.source = 'folder' and config.data.sources ['a', 'b'] exclude each other",
    ),
    *(
        (
            mixture(starts=starts),
            f"config.data.phases start at {[*starts]}; shares of the run must rise from 0 and "
            "stay below 1",
        )
        for starts in [(0.1,), (0.0, 0.5, 0.5), (0.0, 0.5, 0.4), (0.0, 1.0)]
    ),
    *(
        (
            mixture(weights=weights),
            f"config.data.phases: 'phase 0' has weights {weights}; it needs one for each of the "
            "sources ['a', 'b']",
        )
        for weights in [(1.0,), (1.0, -1.0), (0.0, 0.0)]
    ),
    ({"model__spark__neuron_share": 1.0}, "spark.neuron_share = 1.0 must be in [0, 1)"),
    ({"model__spark__attention_top_k": -1}, "spark.attention_top_k = -1 must not be negative"),
    ({"model__spark__neuron_share": 0.1}, "spark.neuron_share = 0.1 is for dense models"),
    ({"model__spark__predictor_width": 4}, "acts with spark.neuron_share only"),
    (SPARK | {"model__spark__predictor_width": 2**20}, "must leave entries of hidden_size"),
    (SPARK | {"model__lora": LoraConfig(rank=2, targets=("up",))}, "a Spark layer does not have"),
    (
        {"model__spark__attention_top_k": 4, "model__head_dim": 6},
        "head_dim = 6 must be a multiple of 4: Spark attention",
    ),
    (
        {"model__spark__attention_top_k": 4, "model__attention_dropout": 0.1},
        "attention_dropout = 0.1 is not implemented for Spark attention",
    ),
    ({"model__latent__width": 100}, "latent.width = 100 must be a multiple of twice group_size"),
    ({"model__latent__rotary_dim": 3}, "latent.rotary_dim = 3 must be even and at least 2"),
    (
        LATENT | {"model__use_qk_norm": True},
        "use_qk_norm = True does not act on latent attention",
    ),
    (LATENT | {"model__num_kv_heads": 2}, "num_kv_heads = 2 must be num_heads = 4 with latent"),
    (LATENT | {"model__lora": LoraConfig(rank=2)}, "latent attention has no adapters"),
]


def contains(text, pattern):
    """Whether the pieces of `pattern` between ' .* ' occur in order."""
    return (
        re.search(" .* ".join(re.escape(piece) for piece in pattern.split(" .* ")), text)
        is not None
    )


@pytest.mark.parametrize(("changes", "message"), BROKEN, ids=str)
def test_a_broken_rule_is_explained(changes, message):
    with pytest.raises(ConfigError) as caught:
        with_values(**changes)
    assert contains(str(caught.value), message), str(caught.value)


def test_every_rule_is_broken_above(monkeypatch):
    modules = (model, mesh, data, optim, post, train, run)
    rules = {
        (module.__file__, node.lineno)
        for module in modules
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require"
    }
    assert len(rules) > 20
    seen = set()

    def spy(is_ok, message):
        if not is_ok:
            caller = sys._getframe(1)
            seen.add((caller.f_code.co_filename, caller.f_lineno))
            raise ConfigError(message)

    for module in modules:
        monkeypatch.setattr(module, "require", spy)
    for changes, _ in BROKEN:
        with pytest.raises(ConfigError):
            with_values(**changes)
    assert seen == rules, f"rules without a case here: {sorted(rules - seen)}"


def test_a_section_built_in_python_is_checked():
    with pytest.raises(ConfigError, match=r"config\.train\.num_steps = 0 must be at least 1"):
        TrainConfig(num_steps=0)
    with pytest.raises(ConfigError, match=r"config\.train\.num_steps = '5' is a str"):
        dataclasses.replace(BASE.train, num_steps="5")
    with pytest.raises(ConfigError, match=r"config\.train = 3 must be a section"):
        dataclasses.replace(BASE, train=3)
    with pytest.raises(ConfigError, match=r"expert = 3; each shard holds an equal share"):
        Config(BASE.model, mesh=MeshConfig(expert=3))
    schedule = ScheduleConfig(peak_lr=1, warmup_steps=0)
    assert type(schedule.peak_lr) is float  # as from a command line
    assert dataclasses.replace(BASE.model, eos_token_ids=[3]).eos_token_ids == (3,)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__moe__group_size": 64},
        {"model__moe__group_size": 512},
        {"model__moe__top_k": 8},
        {"model__pad_token_id": -1},
        {"model__pad_token_id": 319},
        {"model__rope_type": "linear", "model__rope_alpha": 0.0},
        {"model__head_dim": 2, "model__rope_type": "plain"},
        {"schedule__warmup_steps": 200},
        {
            "schedule__name": "cosine_with_min_lr",
            "schedule__decay_ratio": 7.0,
            "schedule__min_lr": 3e-4,
        },
        {"mesh__data": 1, "mesh__expert": -1},
        {"model__moe": MoeConfig(group_size=100)},  # a dense model routes nothing
        mixture(weights=(0.0, 1.0)),
    ],
    ids=str,
)
def test_what_lies_on_the_edge_of_a_rule_is_accepted(changes):
    with_values(**changes)


@pytest.mark.parametrize("name", ["a52b", "a52b_instruct", "a13b", "tiny", "bench"])
def test_presets_survive_a_dict(name):
    preset = getattr(presets, name)()
    assert from_dict(type(preset), to_dict(preset)) == preset


@settings(derandomize=True)
@given(group_size=st.integers(1, 70), batch_size=st.integers(1, 6), seq_len=st.integers(1, 30))
def test_the_rule_for_groups_is_that_of_the_router(group_size, batch_size, seq_len):
    # What passes here must route, and what is refused must be refused there too.
    from hunyuan_jax.layers.ffn.moe import routing

    moe = dataclasses.replace(BASE.model.moe, group_size=group_size)
    outcomes = []
    for check in (
        lambda: with_values(model__moe=moe, train__batch_size=batch_size, train__seq_len=seq_len),
        lambda: routing.group_size(moe, batch_size, seq_len),
    ):
        try:
            check()
            outcomes.append(True)
        except ConfigError:
            outcomes.append(False)
    assert outcomes[0] == outcomes[1]


def sections(cls=Config):
    yield cls
    for hint in section.field_types(cls).values():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from sections(inner)


@pytest.mark.parametrize("cls", [*sections()])
def test_every_field_has_a_meaning_of_one_sentence(cls):
    meanings = section.meanings(cls)
    assert list(meanings) == [field.name for field in dataclasses.fields(cls)]
    for name, meaning in meanings.items():
        assert meaning.endswith(".") and len(meaning) < 200, (name, meaning)


def test_every_field_has_a_type_that_is_checked():
    for cls in sections():
        for name, hint in section.field_types(cls).items():
            origin = typing.get_origin(hint)
            assert (
                dataclasses.is_dataclass(hint)
                or hint in (int, float, str, bool, AnyPath, LocalPath)
                or origin in (typing.Literal, tuple)
            ), (cls, name)


def test_schedule_names_are_all_accepted():
    for name in typing.get_args(config_lib.ScheduleName):
        assert from_dict(ScheduleConfig, {"name": name}).name == name


def test_settings_of_answers_that_nobody_writes_or_compares_are_named():
    def idle(**changes):
        lines = without_effect(with_values(**online(retries=5, **changes)))
        return {line.split()[0].removeprefix("config.objective.dpo.online.") for line in lines}

    assert idle(share=0.0, endpoint="") == {"max_new_tokens", "retries"}
    assert idle(endpoint="", reward_model="runs/judge") == {"retries"}
    assert idle() == set()


# Nothing heavy before it is needed


@pytest.mark.parametrize(
    "statement",
    [
        "import hunyuan_jax",
        "import hunyuan_jax.config, hunyuan_jax.presets",
        "import hunyuan_jax; hunyuan_jax.presets.tiny()",
        "import hunyuan_jax.cli, hunyuan_jax.flags.parse",
    ],
)
def test_configuration_loads_no_jax(statement):
    code = (
        f"{statement}; import sys; loaded = {{'jax', 'flax', 'optax', 'grain'}} & "
        f"set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_unknown_attribute_of_the_package_is_an_error():
    import hunyuan_jax

    with pytest.raises(AttributeError, match="no attribute 'from_pretraind'"):
        hunyuan_jax.from_pretraind  # noqa: B018
    assert set(hunyuan_jax.__all__) == {"Sampling", "from_pretrained", "load", "presets"}
    for name in hunyuan_jax.__all__:
        assert getattr(hunyuan_jax, name) is not None
