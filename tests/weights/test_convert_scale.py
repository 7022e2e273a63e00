"""convert_torch.py: every tensor in and out once, the same bytes back, killed runs continued,
faults found, bad input named.
"""

import dataclasses
import filecmp
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from hunyuan_jax import from_pretrained, presets
from hunyuan_jax import storage as place
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.train.state import abstract_model
from hunyuan_jax.weights import chunks, hf_config, stream, verify, write
from hunyuan_jax.weights import names as table
from hunyuan_jax.weights.folder import OfficialFolder
from hunyuan_jax.weights.open import export_model
from support import goldens, paths
from support.folders import HF, contents, write_source

ROOT = paths.ROOT
BFLOAT16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the tensors of a one-shard folder."""
    file = folder / "model-00001-of-00001.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, file.name)})
    )


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "convert_torch.py"), *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.fixture
def source(tmp_path) -> Path:
    return write_source(tmp_path / "source", num_shards=1)


@pytest.mark.heavy
def test_all_tensors_of_a52b_at_reduced_width(tmp_path):
    cfg = presets.a52b()
    source = write_source(
        tmp_path / "source",
        80,
        vocab_size=64,
        intermediate_size=8,
        num_hidden_layers=64,
        num_experts=16,
        torch_dtype="bfloat16",
    )
    assert (cfg.num_layers, cfg.moe.num_experts, cfg.cla_share_factor) == (64, 16, 2)
    assert stream.import_model(source, tmp_path / "ours") == 3778
    export_model(tmp_path / "ours", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    assert (tmp_path / "ours/tokenizer_config.json").read_bytes() == (
        source / "tokenizer_config.json"
    ).read_bytes()


@pytest.mark.cases(2)
@pytest.mark.parametrize("case", ["a52b_tiny", "bf16", "topk_nocla", "dense_bias"])
def test_golden_folders_come_back_and_orbax_restores_them(case, tmp_path, monkeypatch):
    monkeypatch.setattr(
        chunks, "_MAX_CHUNK_BYTES", 1000
    )  # several chunks a tensor, the last one filled up
    (tmp_path / "source").mkdir()
    for path in goldens.folder_of(case).iterdir():
        if path.name.startswith(("model", "config")):
            (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    stream.import_model(tmp_path / "source", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "source")
    ours, theirs = from_pretrained(tmp_path / "ours"), from_pretrained(tmp_path / "source")
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    shapes = abstract_model(ours.config, single_device_mesh())[1]
    assert jax.tree.map(lambda a: a.shape, ours.params) == jax.tree.map(lambda a: a.shape, shapes)
    if case in ("a52b_tiny", "topk_nocla"):
        assert verify.verify(tmp_path / "source", tmp_path / "ours") == []


@pytest.mark.heavy
def test_a_killed_import_is_continued_without_doing_anything_twice(tmp_path):
    source = write_source(
        tmp_path / "source",
        4,
        intermediate_size=64,
        num_hidden_layers=16,
        num_experts=16,
        vocab_size=64,
    )
    command = [
        sys.executable,
        ROOT / "convert_torch.py",
        "import",
        f"--source={source}",
        f"--output={tmp_path / 'ours'}",
    ]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    params = tmp_path / "ours/params"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and sum(1 for p in params.rglob("*.0") if p.is_file()) < 100:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(ConfigError, match="has not finished"):
        stream.open_converted(place.Place(tmp_path / "ours"))
    before = {
        path: path.stat().st_mtime_ns
        for path in params.rglob("*")
        if path.is_file() and path.suffix != ".partial"
    }
    done = stream.import_model(source, tmp_path / "ours")
    assert 0 < done <= 946 - 100
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert stream.import_model(source, tmp_path / "ours") == 0
    export_model(tmp_path / "ours", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_urls_of_both_sides(source):
    memory = fsspec.filesystem("memory")
    for name, data in contents(source).items():
        memory.pipe_file(f"/source/{name}", data)
    stream.import_model("memory://source", "memory://ours")
    export_model("memory://ours", "memory://back")
    assert {name: memory.cat_file(f"/back/{name}") for name in contents(source)} == contents(
        source
    )
    for folder in ("/source", "/ours", "/back"):
        memory.rm(folder, recursive=True)


def test_a_file_system_without_sizes_is_refused(source, monkeypatch):
    web = fsspec.filesystem("memory")
    web.pipe("/web/config.json", (source / "config.json").read_bytes())
    found = [{"name": "/web/config.json", "size": None, "type": "file"}]
    monkeypatch.setattr(type(web), "ls", lambda *_, **__: found)
    with pytest.raises(
        ConfigError, match=r"memory://web does not tell the sizes of its files.*copy"
    ):
        stream.import_model("memory://web", "memory://ours")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """0.53 GB of weights where the program, which itself takes 0.5 GB of address space, has 0.8;
    the largest tensor has 5 MB.
    """
    hf = HF | {
        "hidden_size": 1024,
        "intermediate_size": 2560,
        "num_hidden_layers": 2,
        "num_experts": 16,
        "torch_dtype": "bfloat16",
    }
    entries = table.entries(hf_config.from_hf(hf))
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text(json.dumps(hf))
    with open(tmp_path / "source/model.safetensors", "wb") as f:
        f.write(write.header([(e.name, BFLOAT16, e.shape) for e in entries]))
        f.truncate(
            f.tell() + sum(2 * int(np.prod(e.shape)) for e in entries)
        )  # zeros, which take no room
    assert os.path.getsize(tmp_path / "source/model.safetensors") > 5.2e8

    def limited(*arguments):
        command = [
            "bash",
            "-c",
            'ulimit -v 781250 && exec "$@"',
            "bash",
            sys.executable,
            ROOT / "convert_torch.py",
            *arguments,
        ]
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OPENBLAS_NUM_THREADS": "1",
        }  # its threads reserve memory for each core
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    for command, source, output in (("import", "source", "ours"), ("export", "ours", "back")):
        where = "source" if command == "import" else "checkpoint"
        done = limited(command, f"--{where}={tmp_path / source}", f"--output={tmp_path / output}")
        assert done.returncode == 0, done.stderr[-2000:]
    assert filecmp.cmp(
        tmp_path / "source/model.safetensors", tmp_path / "back/model.safetensors", shallow=False
    )
    # `verify` takes 0.4 GB by itself, and 0.5 more in float32 for each layer that is in memory
    # whole.
    code = (
        "import sys; from hunyuan_jax.weights import verify; print(verify.verify(*sys.argv[1:]), "
        "open('/proc/self/status').read())"
    )
    command = [sys.executable, "-c", code, tmp_path / "source", tmp_path / "ours"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.stdout.startswith("[] "), done.stderr[-2000:]
    assert int(re.search(r"VmHWM:\s*(\d+) kB", done.stdout)[1]) < 950_000


@pytest.mark.heavy
def test_dtype_of_the_command_line(source, tmp_path):
    done = run("import", "--source", source, "--output", tmp_path / "ours", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    model = from_pretrained(tmp_path / "ours")
    assert (
        model.config.dtype == "bfloat16"
        and model.params["embed"]["embedding_VD"].dtype == BFLOAT16
    )
    assert model.params["groups"]["layer_0"]["moe"]["router_DE"].dtype == np.float32
    expected = from_pretrained(source, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
    export_model(tmp_path / "ours", tmp_path / "back")
    jax.tree.map(
        np.testing.assert_array_equal, from_pretrained(tmp_path / "back").params, expected.params
    )


def test_fp8_is_multiplied_out(source, tmp_path):
    hf = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": "fp8", "activation_scheme": "static"}
    (source / "config.json").write_text(json.dumps(hf | {"quantization_config": quantization}))
    name = "model.layers.0.mlp.experts.1.gate_proj"

    def quantize(tensors):
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].astype(FP8)
        tensors[f"{name}.weight_scale"] = np.array(0.25, np.float32)
        tensors[f"{name}.input_scale"] = np.array(0.5, np.float32)

    rewrite(source, quantize)
    stream.import_model(source, tmp_path / "ours")
    ours = from_pretrained(tmp_path / "ours").params["groups"]["layer_0"]["moe"]["experts"][
        "w_gate_EDF"
    ][0, 1]
    expected = (
        OfficialFolder(place.Place(source)).read_tensor(f"{name}.weight").astype(np.float32) * 0.25
    )
    np.testing.assert_array_equal(ours, expected.T)
    assert json.loads((tmp_path / "ours/conversion.json").read_text())["scales"] == {
        f"{name}.input_scale": 0.5
    }
    assert (
        verify.compare_tensors(
            OfficialFolder(place.Place(source)),
            stream.open_converted(place.Place(tmp_path / "ours")),
        )
        == []
    )


# -----------------------------------------------------------------------------
# seeded faults


def swap(params: Path, first: str, second: str) -> None:
    a, b = (params / first).read_bytes(), (params / second).read_bytes()
    (params / first).write_bytes(b)
    (params / second).write_bytes(a)


MOE = "groups.layer_0.moe.experts.w_"
FAULTS = {
    "swapped gate and up": lambda p: swap(p, f"{MOE}gate_EDF/0.1.0.0", f"{MOE}up_EDF/0.1.0.0"),
    "permuted experts": lambda p: [
        swap(p, f"{MOE}{w}/0.0.0.0", f"{MOE}{w}/0.2.0.0")
        for w in ("gate_EDF", "up_EDF", "down_EFD")
    ],
    "key norm of a cross layer": lambda p: (p / "groups.layer_1.attn.k_norm_H/0.0").write_bytes(
        np.ones(4, np.float32).tobytes()
    ),
}


@pytest.mark.cases(2)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_the_weights_are_found_by_both_comparisons(fault, source, tmp_path):
    stream.import_model(source, tmp_path / "ours")
    FAULTS[fault](tmp_path / "ours/params")
    opened, converted = (
        OfficialFolder(place.Place(source)),
        stream.open_converted(place.Place(tmp_path / "ours")),
    )
    layer = 1 if "cross" in fault else 0
    tensors, layers = (
        verify.compare_tensors(opened, converted),
        verify.compare_layers(opened, converted),
    )
    assert tensors and all(line.startswith(f"model.layers.{layer}.") for line in tensors)
    assert len(layers) == 1 and layers[0].startswith(f"layer {layer}:")


def test_a_table_that_is_wrong_in_both_directions_is_found_by_the_layers(
    source, tmp_path, monkeypatch
):
    right = table.entries

    def wrong(cfg):
        swapped = {"gate": "up", "up": "gate"}
        return [
            e._replace(path=re.sub("w_(gate|up)_", lambda m: f"w_{swapped[m[1]]}_", e.path))
            for e in right(cfg)
        ]

    monkeypatch.setattr(table, "entries", wrong)
    stream.import_model(source, tmp_path / "ours")
    opened, converted = (
        OfficialFolder(place.Place(source)),
        stream.open_converted(place.Place(tmp_path / "ours")),
    )
    assert verify.compare_tensors(opened, converted) == []
    assert [line.split(":")[0] for line in verify.compare_layers(opened, converted)] == [
        f"layer {i}" for i in range(4)
    ]


def test_a_wrong_rope_alpha_is_found(tmp_path):
    # With head_dim 4 the only frequency that depends on alpha turns by nothing in a short text.
    source = write_source(tmp_path / "source", hidden_size=32, num_hidden_layers=2)
    stream.import_model(source, tmp_path / "ours")
    path = tmp_path / "ours/config.json"
    path.write_text(path.read_text().replace("1000.0", "1500.0"))
    done = run("verify", "--source", source, "--checkpoint", tmp_path / "ours")
    assert (
        done.returncode == 1
        and "config: rope_alpha = 1000.0 in the source, 1500.0 in the checkpoint" in done.stdout
    )
    found = verify.compare_layers(
        OfficialFolder(place.Place(source)), stream.open_converted(place.Place(tmp_path / "ours"))
    )
    assert found and all(line.startswith("layer ") for line in found)


def test_a_missing_chunk_is_not_read_as_zeros(source, tmp_path):
    stream.import_model(source, tmp_path / "ours")
    (tmp_path / f"ours/params/{MOE}gate_EDF/1.2.0.0").unlink()
    with pytest.raises(ConfigError, match=r"lacks chunks.*w_gate_EDF/1\.2\.0\.0"):
        from_pretrained(tmp_path / "ours")


# -----------------------------------------------------------------------------
# bad input


def truncate(source):
    file = source / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


NORM, KEY_NORM = "model.norm.weight", "model.layers.1.self_attn.key_layernorm.weight"
BAD = {
    "missing key": (
        lambda s: rewrite(s, lambda t: t.pop("model.layers.1.self_attn.key_layernorm.weight")),
        r"are missing: .*1\.self_attn\.key",
    ),
    "extra key": (lambda s: rewrite(s, lambda t: t.update(extra=np.ones(1))), r"dtype F64"),
    "unknown key": (
        lambda s: rewrite(s, lambda t: t.update(extra=np.ones(1, np.float32))),
        r"does not have: extra",
    ),
    "shape": (
        lambda s: rewrite(s, lambda t: t.update({NORM: np.ones(3, np.float32)})),
        r"another shape: .*norm\.weight \(3,\), not \(16,\)",
    ),
    "nan": (
        lambda s: rewrite(s, lambda t: t[NORM].__setitem__(2, np.nan)),
        r"model\.norm\.weight holds NaN",
    ),
    "truncated": (
        truncate,
        r"00001\.safetensors is truncated or damaged: it has \d+ bytes, its header asks for \d+",
    ),
    "missing shard": (
        lambda s: (s / "model-00001-of-00001.safetensors").unlink(),
        r"model-00001-of-00001\.safetensors is not there",
    ),
    "architecture": (
        lambda s: (s / "config.json").write_text('{"model_type": "llama"}'),
        r"model_type = 'llama'",
    ),
    "other head": (
        lambda s: rewrite(
            s, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})
        ),
        r"lm_head\.weight differs",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_sources_are_named_in_one_line(what, source, tmp_path):
    change, message = BAD[what]
    change(source)
    with pytest.raises(ConfigError, match=message) as error:
        stream.import_model(source, tmp_path / "ours")
    assert "\n" not in str(error.value)


def test_an_output_of_another_source_is_refused(source, tmp_path):
    stream.import_model(source, tmp_path / "ours")
    rewrite(source, lambda t: t[NORM].__setitem__(0, 7.0))  # the same names and shapes
    with pytest.raises(ConfigError, match="holds an import of another source"):
        stream.import_model(source, tmp_path / "ours")
    with pytest.raises(ConfigError, match="is not empty"):
        export_model(tmp_path / "ours", source)


def test_a_full_disk_is_refused_before_starting(source, tmp_path, monkeypatch):
    usage = place.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(place.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        ConfigError,
        match=r"not enough disk: 0\.\d+ GB are still to be written, 0\.000 GB are free",
    ):
        stream.import_model(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_command_line_answers_in_one_line(tmp_path):
    for arguments in (
        ["import", "--source=nowhere", f"--output={tmp_path}/x"],
        ["convert"],
        ["export", "--checkpoint=x"],
    ):
        done = run(*arguments)
        assert (
            done.returncode == 2
            and done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
        ), done.stderr


def test_every_model_field_can_differ():
    cfg = hf_config.from_hf(HF)
    other = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, top_k=2))
    assert [field for field, a, b in verify._fields(cfg, other) if a != b] == ["moe.top_k"]
