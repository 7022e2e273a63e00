"""LoRA: adapters alone are trained, on any mesh; merged, exported and read back they are one
model.  And runs that start from weights.
"""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from hunyuan_jax import cli, from_pretrained
from hunyuan_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.layers import lora
from hunyuan_jax.layers.ffn.moe import experts
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.params import tree
from hunyuan_jax.params.abstract import shardings
from hunyuan_jax.train import loop
from hunyuan_jax.train.state import (
    abstract_model,
    build_program,
    convert,
    init_state,
)
from hunyuan_jax.train.step import make_train_step
from hunyuan_jax.weights import names
from hunyuan_jax.weights import peft as peft_io
from pallas_kernels import tpu_compiler
from support.folders import flat
from support.models import COMPILER_OPTIONS, assert_close, fast_jit, mesh_of
from support.runs import losses

LORA = LoraConfig(rank=3, alpha=6.0)
MLP, EXPERTS = ("gate", "up", "down"), ("expert_gate", "expert_up", "expert_down")

MOE = MoeConfig(num_experts=4, num_shared_experts=1)


def small(**changes) -> ModelConfig:
    """CLA pairs, so that half of the layers have no keys and values."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    return dataclasses.replace(
        ModelConfig(vocab_size=264, max_position=64, cla_share_factor=2, init_std=0.3, **sizes),
        **changes,
    )


@pytest.fixture(autouse=True)
def quick_compilation(monkeypatch):
    monkeypatch.setattr(tpu_compiler, "train_step_options", lambda kind: COMPILER_OPTIONS)
    monkeypatch.setattr(loop, "make_mesh", lambda _: single_device_mesh())


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: abcabcabc\n" for i in range(200)))
    return path


def config(model: ModelConfig, **optimizer) -> Config:
    schedule = ScheduleConfig(peak_lr=1e-2, warmup_steps=0, anneal_fraction=0.0, decay_ratio=1.0)
    return Config(
        model,
        optimizer=OptimizerConfig(**optimizer),
        schedule=schedule,
        train=TrainConfig(num_steps=3, batch_size=4, seq_len=12),
    )


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, 256, (2, 4, 12)).astype(np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (4, 12))
    ones = np.ones((4, 12), np.float32)
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": ones.astype(np.int32),
        "positions": positions,
        "loss_weights": ones,
    }


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(scale=0.3, size=a.shape).astype(np.float32), tree)


def random_params(cfg):
    return random_like(abstract_model(cfg, single_device_mesh())[1])


def split(params, cfg):
    """(adapters, the rest)"""
    return tree.split(params, abstract_model(cfg, single_device_mesh())[1])


def with_random_adapters(params, cfg, seed=0):
    adapters = random_like(split(params, cfg)[0], seed)
    return tree.join(params, adapters)


def logits_of(cfg, params, mesh=None):
    mesh = mesh or single_device_mesh()
    graph_def = abstract_model(cfg, mesh)[0]
    tokens, positions = batch()["tokens"], batch()["positions"]

    def fn(params):
        model = nnx.merge(graph_def, params)
        return model.logits(model(tokens, positions, np.ones_like(tokens)).hidden_BTD)

    return np.asarray(fast_jit(fn)(params))


@pytest.fixture(scope="module")
def adapted():
    """(config, parameters) with adapters that do something."""
    cfg = small(lora=LORA)
    params = jax.tree.map(
        np.asarray, init_state(build_program(config(cfg), single_device_mesh())).params
    )
    return cfg, with_random_adapters(params, cfg)


# -----------------------------------------------------------------------------
# training


def test_only_producers_have_adapters_of_keys_and_values(adapted):
    cfg, params = adapted
    found = {
        re.sub(r"groups/layer_(\d)/attn/w(\w)_lora_([ab])_\w+", r"\1\2\3", path)
        for path in flat(split(params, cfg)[0])
    }
    assert found == {
        layer + target + ab
        for layer, targets in (("0", "qkvo"), ("1", "qo"))
        for target in targets
        for ab in "ab"
    }


@pytest.mark.heavy
def test_training_begins_at_the_base_model_and_moves_the_adapters_alone():
    cfg = small(lora=LORA, moe=MOE)
    program = build_program(config(cfg), single_device_mesh())
    state = init_state(program)
    before = jax.tree.map(np.asarray, state.params)
    plain_cfg, plain = dataclasses.replace(cfg, lora=LoraConfig()), split(before, cfg)[1]
    np.testing.assert_array_equal(logits_of(cfg, before), logits_of(plain_cfg, plain))

    # The optimizer knows nothing but the adapters.
    names = {path for path in flat(program.state.opt_state) if "groups" in path or "embed" in path}
    assert names and all("_lora_" in path for path in names)
    assert flat(program.taps).keys() == flat(split(before, cfg)[0]).keys()

    step, first_losses = make_train_step(program), []
    for _ in range(6):
        state, metrics = step(state, batch())
        first_losses.append(float(metrics["loss"]))
    assert first_losses[-1] < first_losses[0] - 0.02
    for path, array in flat(state.params).items():
        assert np.array_equal(array, flat(before)[path]) != ("_lora_" in path), path


@pytest.mark.heavy
def test_gradients_are_those_of_the_merged_weights():
    """d loss / d B = scale A^T dW and d loss / d A = scale dW B^T, with dW of the merged model."""
    cfg = small(lora=LORA)
    params = with_random_adapters(
        jax.tree.map(
            np.asarray, init_state(build_program(config(cfg), single_device_mesh())).params
        ),
        cfg,
    )
    plain_cfg, merged = lora.merge(cfg, params)

    def gradient(cfg, params):
        graph_def = abstract_model(cfg, single_device_mesh())[0]

        def loss(params):
            model, b = nnx.merge(graph_def, params), batch()
            return model.token_losses(
                model(b["tokens"], b["positions"], b["segment_ids"]).hidden_BTD, b["targets"]
            ).mean()

        return flat(fast_jit(jax.grad(loss))(params))

    ours, plain, values = gradient(cfg, params), gradient(plain_cfg, merged), flat(params)
    for layer in ("layer_0", "layer_1"):
        for target in "qkvo" if layer == "layer_0" else "qo":
            w, a, b = (f"groups/{layer}/attn/{name}" for name in lora.names(target))
            a_PIr, b_PrO = values[a].reshape(2, -1, 3), values[b].reshape(2, 3, -1)
            dw_PIO = np.asarray(plain[w]).reshape(2, a_PIr.shape[1], b_PrO.shape[2])
            assert_close(ours[a].reshape(a_PIr.shape), 2.0 * dw_PIO @ b_PrO.swapaxes(1, 2), 1e-4)
            assert_close(ours[b].reshape(b_PrO.shape), 2.0 * a_PIr.swapaxes(1, 2) @ dw_PIO, 1e-4)


@pytest.fixture(scope="module")
def adapted_experts():
    """The same with adapters on experts, and other projections of theirs than of the attention."""
    cfg = small(
        lora=dataclasses.replace(LORA, targets=("v", *MLP, *EXPERTS)),
        moe=MOE,
        kernels="xla",
        num_layers=2,
    )
    return cfg, random_params(cfg)


def test_all_projections_of_experts_have_adapters(adapted_experts):
    cfg, params = adapted_experts
    names = {name for target in EXPERTS for name in lora.names(target)[1:]}
    for layer in ("layer_0", "layer_1"):
        moe = split(params, cfg)[0]["groups"][layer]["moe"]
        assert moe["experts"].keys() == names and moe["shared"].keys() == {
            name for target in MLP for name in lora.names(target)[1:]
        }
        assert moe["experts"]["w_down_lora_a_EFr"].shape == (1, 4, 16, 3) and moe["experts"][
            "w_down_lora_b_ErD"
        ].shape == (1, 4, 3, 16)
    dense = small(lora=dataclasses.replace(LORA, targets=("down",)))
    paths = {
        path for path in flat(abstract_model(dense, single_device_mesh())[1]) if "_lora_" in path
    }
    assert paths == {
        f"groups/layer_{i}/mlp/{name}" for i in (0, 1) for name in lora.names("down")[1:]
    }


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("dispatch", "mesh"),
    [
        ("dropless", {}),
        pytest.param("dropless", {"expert": 4}, marks=pytest.mark.slow),
        pytest.param("recycle", {"expert": 4}, marks=pytest.mark.slow),
        ("drop", {"data": 2, "expert": 2, "tensor": 2}),
    ],
)
@pytest.mark.slow
def test_experts_with_adapters_are_the_merged_experts_on_every_mesh(
    adapted_experts, dispatch, mesh
):
    """Loss, and the gradient of every adapter from that of its merged matrix."""
    cfg, params = adapted_experts
    cfg = dataclasses.replace(
        cfg, moe=dataclasses.replace(MOE, dispatch=dispatch, top_k=2, capacity_factor=1.0)
    )
    plain_cfg, merged = lora.merge(cfg, params)

    def gradient(cfg, params, mesh):
        graph_def, specs = abstract_model(cfg, mesh)

        def loss(params):
            model, b = nnx.merge(graph_def, params), batch()
            output = model(b["tokens"], b["positions"], b["segment_ids"], key=jax.random.key(0))
            return model.token_losses(output.hidden_BTD, b["targets"]).mean()

        return fast_jit(jax.value_and_grad(loss))(jax.device_put(params, shardings(specs)))

    expected, plain = gradient(plain_cfg, merged, single_device_mesh())
    found, gradients = gradient(cfg, params, mesh_of(**mesh))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    plain, gradients, values = map(flat, (plain, gradients, params))
    for target in (*MLP, *EXPERTS):
        w, a, b = (
            f"groups/layer_1/moe/{'experts' if target in EXPERTS else 'shared'}/{name}"
            for name in lora.names(target)
        )
        assert_close(gradients[a], 2.0 * plain[w] @ np.swapaxes(values[b], -1, -2), 2e-4)
        assert_close(gradients[b], 2.0 * np.swapaxes(values[a], -1, -2) @ plain[w], 2e-4)


@pytest.mark.heavy
def test_adapters_of_experts_are_trained_alone(adapted_experts):
    cfg, params = adapted_experts
    program = build_program(config(cfg), mesh_of(expert=2))
    before = flat(jax.tree.map(np.asarray, params))
    state, metrics = make_train_step(program)(init_state(program, params), batch())
    assert np.isfinite(metrics["loss"])
    for path, array in flat(state.params).items():
        assert np.array_equal(array, before[path]) != ("_lora_" in path), path


def test_experts_with_adapters_and_kernels_are_refused(adapted_experts):
    cfg, _ = adapted_experts
    for targets in (MLP, EXPERTS):
        changed = dataclasses.replace(
            cfg, kernels="pallas_tpu,xla", lora=dataclasses.replace(LORA, targets=targets)
        )
        shapes = abstract_model(changed, single_device_mesh())[1]
        with pytest.raises(
            ConfigError,
            match=r"kernels = pallas_tpu,xla on cpu would run expert kernels.*set "
            r"config\.model\.kernels=xla",
        ):
            logits_of(changed, jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes))
    with pytest.raises(ConfigError, match="kernels = auto on TPU v5"):
        experts.swiglu_adapted(
            None, None, None, (), {"implementation": None, "device_kind": "TPU v5"}
        )


@pytest.mark.slow
def test_experts_with_adapters_generate_what_the_merged_experts_do(adapted_experts):
    cfg, params = adapted_experts
    ids = [[1, 2], [3, 4]]
    tokens = Pretrained(cfg, params).generate(ids, max_new_tokens=4, eos_token_id=())
    merged = Pretrained(*lora.merge(cfg, params))
    expected = merged.generate(ids, max_new_tokens=4, eos_token_id=())
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.slow
def test_the_same_on_every_mesh(adapted):
    cfg, params = adapted
    runs = []
    for mesh in (single_device_mesh(), mesh_of(data=2, expert=2, tensor=2)):
        program = build_program(config(cfg), mesh)
        state, metrics = make_train_step(program)(init_state(program, params), batch())
        runs.append(
            (
                float(metrics["loss"]),
                float(metrics["grad_norm"]),
                {p: np.asarray(a) for p, a in flat(state.params).items()},
            )
        )
        leaf = flat(state.params)["groups/layer_0/attn/wq_lora_b_rNH"]
        assert leaf.sharding.shard_shape(leaf.shape)[2] == 4 // mesh.shape["tensor"]
    assert runs[0][:2] == pytest.approx(runs[1][:2], rel=1e-5)
    for path, array in runs[0][2].items():
        np.testing.assert_allclose(array, runs[1][2][path], atol=2e-5, err_msg=path)


@pytest.mark.parametrize(
    "state_dtype", ["bfloat16", pytest.param("fp8_lm", marks=pytest.mark.slow)]
)
@pytest.mark.heavy
def test_what_is_frozen_is_kept_as_it_is_used(state_dtype):
    cfg = small(lora=LORA, dtype="bfloat16")
    program = build_program(config(cfg, state_dtype=state_dtype), single_device_mesh())
    state = init_state(program)
    for path, array in flat(state.params).items():
        if "_lora_" not in path:
            is_matrix = re.search(r"/(w|embedding)\w+$", path)
            assert array.dtype == (jnp.bfloat16 if is_matrix else jnp.float32), path
    before = flat(jax.tree.map(np.asarray, state.params))
    state, metrics = make_train_step(program)(state, batch())
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    moved = {
        path
        for path, array in flat(state.params).items()
        if not np.array_equal(np.asarray(array), before[path])
    }
    assert moved and all("_lora_" in path for path in moved)
    # A run that is continued with another state_dtype: the adapters are converted, the rest stays
    # as it is.
    converted = convert(build_program(config(cfg), single_device_mesh()), state)
    for path, array in flat(converted.params).items():
        if "_lora_" in path:
            assert array.dtype == jnp.float32
        else:
            np.testing.assert_array_equal(np.asarray(array), before[path])


@pytest.mark.parametrize("field", ["alpha", "targets"])
def test_fields_have_their_effect(adapted, field):
    cfg, params = adapted
    value = {"alpha": 12.0, "targets": ("v",)}[field]
    other = dataclasses.replace(cfg, lora=dataclasses.replace(LORA, **{field: value}))
    wanted = flat(abstract_model(other, single_device_mesh())[1]).keys()
    if field == "targets":
        assert {path for path in wanted if "_lora_" in path} == {
            f"groups/layer_0/attn/{name}" for name in lora.names("v")[1:]
        }
        return
    assert np.abs(logits_of(other, params) - logits_of(cfg, params)).max() > 1e-2


# -----------------------------------------------------------------------------
# merging


def test_merging_changes_no_logit(adapted):
    cfg, params = adapted
    plain_cfg, merged = lora.merge(cfg, params)
    assert plain_cfg == dataclasses.replace(cfg, lora=LoraConfig()) and not any(
        "_lora_" in path for path in flat(merged)
    )
    assert_close(logits_of(plain_cfg, merged), logits_of(cfg, params), 1e-5)
    assert (
        np.abs(logits_of(plain_cfg, merged) - logits_of(plain_cfg, split(params, cfg)[1])).max()
        > 0.1
    )


# -----------------------------------------------------------------------------
# PEFT


@pytest.fixture
def written(adapted, tmp_path):
    cfg, params = adapted
    peft_io.write_adapter(tmp_path / "adapter", cfg, params, "base")
    return tmp_path / "adapter"


def rewrite(folder, change):
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")


def read_adapter(folder, cfg):
    return peft_io.read_adapter(folder, cfg, names.entries(cfg))


def assert_reads_back(folder, cfg, params):
    read_cfg, adapters = read_adapter(folder, dataclasses.replace(cfg, lora=LoraConfig()))
    assert read_cfg == cfg
    ours = flat(split(params, cfg)[0])
    assert flat(adapters).keys() == ours.keys()
    for path, array in flat(adapters).items():
        np.testing.assert_array_equal(array, ours[path])


def test_adapters_of_experts_survive_the_peft_format(adapted_experts, tmp_path):
    cfg, params = adapted_experts
    peft_io.write_adapter(tmp_path, cfg, params, "base")
    assert_reads_back(tmp_path, cfg, params)
    # No suffix of another module's name.
    modules = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert set(modules) == {"v_proj"} | {
        f"{module}.{target}_proj"
        for module in ("shared_mlp", *(f"experts.{e}" for e in range(4)))
        for target in MLP
    }


@pytest.mark.parametrize(
    ("targets", "is_moe", "named"),
    [
        (("q", "k", "v", "o", *EXPERTS), True, None),
        (("expert_down",), True, None),
        (("q", *MLP), False, None),
        (("expert_gate", "expert_up"), True, "expert_gate, expert_up"),
        (("expert_gate", "expert_down"), True, "expert_gate"),
        (("q", "up", *EXPERTS), True, "up"),
    ],
)
def test_what_peft_would_compute_otherwise_is_said(targets, is_moe, named):
    cfg = small(
        lora=dataclasses.replace(LORA, targets=targets), **({"moe": MOE} if is_moe else {})
    )
    said = peft_io.warnings(cfg)
    assert len(said) == (named is not None)
    assert named is None or f"adapters of {named} in a mixture" in said[0]


def test_what_belongs_to_a_base_in_few_bits_is_said():
    cfg = small(lora=dataclasses.replace(LORA, quantize="int4"), remat="full")
    (said,) = peft_io.warnings(cfg)
    assert "beside a base in int4" in said and "(without --adapter)" in said


def test_adapters_survive_the_peft_format(adapted, written):
    cfg, params = adapted
    assert_reads_back(written, cfg, params)
    names = safetensors.numpy.load_file(written / "adapter_model.safetensors").keys()
    layers = {
        "q": range(4),
        "k": (0, 2),
        "v": (0, 2),
        "o": range(4),
    }  # layers 1 and 3 use the keys and values of 0 and 2
    assert names == {
        f"base_model.model.model.layers.{layer}.self_attn.{target}_proj.lora_{part}.weight"
        for target, where in layers.items()
        for layer in where
        for part in "AB"
    }


def test_an_adapter_of_layers_without_keys_is_refused(adapted, written):
    cfg = dataclasses.replace(adapted[0], lora=LoraConfig())
    name = "base_model.model.model.layers.{}.self_attn.k_proj.lora_A.weight"
    rewrite(written, lambda tensors: tensors.update({name.format(1): tensors[name.format(0)]}))
    with pytest.raises(
        ConfigError,
        match=r"layer 1 has no k_proj: with cla_share_factor = 2 it uses those of layer 0",
    ):
        read_adapter(written, cfg)


def test_adapters_that_do_not_fit_are_refused(adapted, written):
    cfg, name = (
        dataclasses.replace(adapted[0], lora=LoraConfig()),
        "base_model.model.model.layers.3.self_attn.o_proj.lora_B.weight",
    )
    rewrite(written, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(
        ConfigError,
        match=r"o_proj\.lora_B\.weight has shape \(15, 3\); this model and r = 3 ask for \(16, "
        r"3\)",
    ):
        read_adapter(written, cfg)
    rewrite(written, lambda tensors: tensors.pop(name))
    with pytest.raises(
        ConfigError,
        match=r"lacks 1 tensors .* first one .*layers\.3\.self_attn\.o_proj\.lora_B\.weight",
    ):
        read_adapter(written, cfg)
    rewrite(written, lambda tensors: tensors.update({"other": np.zeros(1, np.float32)}))
    with pytest.raises(
        ConfigError,
        match="holds 'other', which an adapter of this model and these target_modules does not "
        "have",
    ):
        read_adapter(written, cfg)
    (written / "adapter_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1"
    )
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        read_adapter(written, cfg)
    (written / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no adapter_model\.safetensors and no"):
        read_adapter(written, cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'; only 'LORA' is implemented"),
        ({"use_dora": True}, "use_dora = True; only False"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            r"target_modules = \['q_proj', 'lm_head'\] asks for lm_head; only q_proj, k_proj, "
            r"v_proj, o_proj, gate_proj, up_proj, down_proj can have",
        ),
        (
            {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]},
            r"lacks 8 tensors that target_modules = .* promises, the first one .*gate_proj",
        ),
        ({"target_modules": ["q_proj", "experts.0.gate_proj"]}, "only q_proj"),
        ({"target_modules": "all-linear"}, "all-linear"),
        ({"r": "8"}, "r = '8'"),
    ],
)
def test_adapters_that_do_more_are_refused(adapted, written, changes, message):
    path = written / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        read_adapter(written, adapted[0])


def test_no_adapter_config_is_refused(adapted, tmp_path):
    with pytest.raises(
        ConfigError, match=r"is not a PEFT adapter: it has no adapter_config\.json"
    ):
        read_adapter(tmp_path, adapted[0])
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a JSON list"):
        read_adapter(tmp_path, adapted[0])


@pytest.mark.filterwarnings("ignore")  # of transformers and peft
@pytest.mark.parametrize(
    "moe",
    [MoeConfig(), dataclasses.replace(MOE, top_k=2, norm_topk_prob=True)],
    ids=["dense", "moe"],
)
def test_peft_on_transformers_has_our_logits(moe, tmp_path):
    """Both ways: our adapter on transformers' model, and PEFT's own adapter merged into ours."""
    peft, transformers, torch = map(pytest.importorskip, ("peft", "transformers", "torch"))
    cfg = small(
        moe=moe,
        cla_share_factor=1,
        lora=dataclasses.replace(
            LORA, targets=(*LORA.targets, *(MLP if moe == MoeConfig() else EXPERTS))
        ),
    )
    params = random_params(cfg)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    Pretrained(dataclasses.replace(cfg, lora=LoraConfig()), split(params, cfg)[1]).save_pretrained(
        base
    )
    peft_io.write_adapter(adapter, cfg, params, str(base))

    ids = batch()["tokens"]
    ours = np.asarray(from_pretrained(base, adapter=adapter).logits(ids))
    np.testing.assert_allclose(ours, logits_of(cfg, params), atol=1e-4, rtol=0)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), adapter
    )
    with torch.no_grad():
        np.testing.assert_allclose(
            ours, theirs(torch.from_numpy(ids).long()).logits.numpy(), atol=1e-4, rtol=0
        )
        plain = from_pretrained(base).logits(ids)
        assert np.abs(np.asarray(plain) - ours).max() > 0.1
        theirs.save_pretrained(tmp_path / "again")
        model = theirs.merge_and_unload()
        np.testing.assert_allclose(
            ours, model(torch.from_numpy(ids).long()).logits.numpy(), atol=1e-4, rtol=0
        )
    if (
        cfg.is_moe
    ):  # PEFT has made two adapters of the fused gate_up_proj and down_proj of the three
        with pytest.raises(
            ConfigError, match=r"rank_pattern = .*gate_up_proj.*only {} is implemented"
        ):
            from_pretrained(base, adapter=tmp_path / "again")
    else:
        np.testing.assert_array_equal(
            ours, np.asarray(from_pretrained(base, adapter=tmp_path / "again").logits(ids))
        )


# -----------------------------------------------------------------------------
# runs from weights


def run_config(text, model, **train):
    train = {
        "num_steps": 2,
        "batch_size": 2,
        "seq_len": 32,
        "log_every": 1,
        "eval_every": 100,
        "eval_batches": 1,
    } | train
    schedule = ScheduleConfig(peak_lr=1e-2, warmup_steps=0)
    data = DataConfig(source=str(text), validation_fraction=0.0)
    return Config(model, data=data, schedule=schedule, train=TrainConfig(**train))


@pytest.mark.slow
def test_runs_start_from_a_workdir(text, tmp_path):
    plain, first = tmp_path / "plain", {}
    assert loop.run(run_config(text, small()), plain) == 0
    for name, model in (("full", small()), ("lora", small(lora=LORA))):
        assert loop.run(run_config(text, model, init_from=str(plain)), tmp_path / name) == 0
        first[name] = losses(tmp_path / name)[1][0]
    assert first["full"] == pytest.approx(
        first["lora"], rel=1e-6
    )  # both begin with the same model
    assert first["full"] < losses(plain)[1][0] - 0.05  # which has learned something
    # The adapters' run is a plain model for whoever reads it, and is continued with adapters.
    tuned, base = from_pretrained(tmp_path / "lora"), from_pretrained(plain)
    assert tuned.config == base.config
    for output, *option in (("adapter", "--adapter"), ("nothing", "--noadapter")):
        command = [
            "export",
            f"--checkpoint={tmp_path / 'lora'}",
            f"--output={tmp_path / output}",
            *option,
        ]
        if option == ["--adapter"]:
            assert cli.run(command) == 0
        else:  # heads twice as wide as the model, in pairs of layers: no official form
            with pytest.raises(ConfigError, match="the official format has no head_dim field"):
                cli.run(command)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(plain)
    again = from_pretrained(plain, adapter=tmp_path / "adapter")
    for path, array in flat(tuned.params).items():
        np.testing.assert_allclose(
            np.asarray(array), np.asarray(flat(again.params)[path]), atol=1e-6
        )
    with pytest.raises(ConfigError, match=r"has trained all parameters .* it has no adapter"):
        cli.run(["export", f"--checkpoint={plain}", "--output=nowhere", "--adapter"])
    moved = {
        path
        for path, array in flat(tuned.params).items()
        if not np.array_equal(array, flat(base.params)[path])
    }
    assert moved == {
        f"groups/layer_{i}/attn/{lora.names(t)[0]}"
        for i, targets in ((0, "qkvo"), (1, "qo"))
        for t in targets
    }
    assert (
        loop.run(
            run_config(text, small(lora=LORA), init_from=str(plain), num_steps=3),
            tmp_path / "lora",
        )
        == 0
    )
    assert losses(tmp_path / "lora").keys() == {1, 2, 3}
    with pytest.raises(ConfigError, match=r"made with config\.model\.lora\.rank = 3; now it is 4"):
        loop.run(
            run_config(text, small(lora=dataclasses.replace(LORA, rank=4)), init_from=str(plain)),
            tmp_path / "lora",
        )


@pytest.mark.heavy
def test_runs_start_from_a_folder_of_the_same_model(text, tmp_path):
    folder, cfg = tmp_path / "folder", small(head_dim=4)
    zeros = jax.tree.map(
        lambda a: np.zeros(a.shape, np.float32), abstract_model(cfg, single_device_mesh())[1]
    )
    Pretrained(cfg, zeros).save_pretrained(folder)
    # How it is computed may differ, and RoPE may turn more slowly, as for longer texts.  Zeros
    # give every token the same probability.
    ours = dataclasses.replace(cfg, remat="full", max_position=48, attention_dropout=0.1)
    ours = dataclasses.replace(ours, rope_alpha=2000.0)
    assert (
        loop.run(run_config(text, ours, init_from=str(folder), num_steps=1), tmp_path / "run") == 0
    )
    assert losses(tmp_path / "run")[1][0] == pytest.approx(math.log(264), rel=1e-5)
    for changes, message in (
        (
            {"rope_alpha": 5.0},
            r"holds a model with rope_alpha = 1000\.0; config\.model\.rope_alpha is 5\.0\. Set it "
            r"to 1000\.0 or more",
        ),
        ({"num_layers": 2}, "num_layers = 4"),
        ({"moe": MOE}, r"moe\.num_experts = 1; config\.model\.moe\.num_experts is 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            loop.run(
                run_config(text, dataclasses.replace(cfg, **changes), init_from=str(folder)),
                tmp_path / "other",
            )
    with pytest.raises(ConfigError, match="is not a model folder"):
        loop.run(run_config(text, cfg, init_from="nowhere"), tmp_path / "third")
