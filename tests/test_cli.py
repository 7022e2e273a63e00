"""The commands as a user types them, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest

from support import paths, processes

REPO = paths.ROOT
TINY = "--config=configs/tiny.py"


def run(*command, timeout=processes.PATIENCE):
    return subprocess.run(
        [sys.executable, *command],
        cwd=REPO,
        env=os.environ | {"XLA_FLAGS": processes.ONE_DEVICE},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def error_of(*command):
    """The one line that says what is wrong; fails on a traceback or another exit status than 2."""
    result = run(*command)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    lines = [line for line in lines if not line.startswith("loading ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            (TINY, "--config.train.num_step=5"),
            "config.train.num_step does not exist. Did you mean config.train.num_steps?",
        ),
        (
            (TINY, "--config.modle.num_layers=5"),
            "config.modle.num_layers does not exist. Did you mean config.model.num_layers?",
        ),
        ((TINY, "--config.train.num_steps=abc"), "--config.train.num_steps=abc"),
        (
            (TINY, "--config.model.moe.dispatch=recicle"),
            "'recicle' is not one of 'recycle', 'drop', 'dropless'",
        ),
        (
            (TINY, "--config.model.num_kv_heads=3"),
            "num_heads = 4 is not divisible by num_kv_heads = 3",
        ),
        (
            (TINY, "--config.mesh.expert=3"),
            "num_experts = 8 does not divide over config.mesh.expert = 3",
        ),
        (
            (TINY, "--config.model.hidden_size=0"),
            "config.model.hidden_size = 0 must be at least 1",
        ),
        (("--config=configs/missing.py",), "--config=configs/missing.py: no such file"),
        ((TINY, "--wrkdir=x"), "wrkdir"),
        ((TINY, "extra"), "unexpected argument 'extra'"),
        ((), "--config is missing"),
    ],
)
def test_bad_command_line_is_one_line(arguments, expected):
    workdir = () if any("wrkdir" in argument for argument in arguments) else ("--workdir=unused",)
    assert expected in error_of("train.py", *arguments, *workdir)
    assert not (REPO / "unused").exists()


def test_missing_workdir():
    assert "--workdir is missing" in error_of("train.py", TINY)


def test_misspelled_key_is_answered_without_jax():
    result = run(
        "-X", "importtime", "train.py", TINY, "--config.train.num_step=5", "--workdir=unused"
    )
    assert result.returncode == 2
    assert " jax\n" not in result.stderr


def test_import_loads_nothing_large():
    large = {"jax", "flax", "optax", "orbax", "grain", "numpy", "ml_collections", "safetensors"}
    code = (
        "import sys, hunyuan_jax; hunyuan_jax.presets.a52b(); hunyuan_jax.Sampling(); "
        f"assert not {large} & sys.modules.keys(), {large} & sys.modules.keys()"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--config.mesh.data=3", "does not use the 1 devices exactly"),
        ("--config.data.source=/does/not/exist", "'/does/not/exist' does not exist"),
        ("--config.data.tokenizer=/no/ranks", "/no/ranks"),
    ],
)
def test_what_the_machine_refuses_is_one_line_too(tmp_path, override, expected):
    assert expected in error_of("train.py", TINY, override, f"--workdir={tmp_path / 'run'}")


@pytest.mark.heavy
def test_count_prints_the_exact_numbers():
    result = run("-m", "hunyuan_jax", "count", "--config=configs/a52b.py", "--json")
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["total"] == 388_698_128_640
    assert counts["active"] == 51_318_800_640
    assert counts["kv_bytes_per_token"] == 81_920
    assert (
        "388,698,128,640" in run("-m", "hunyuan_jax", "count", "--config=configs/a52b.py").stdout
    )


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "hunyuan_jax"),
        ("-m", "hunyuan_jax", "plan"),
        ("-m", "hunyuan_jax", "generate"),
        ("convert_torch.py",),
        ("convert_torch.py", "import"),
        ("train.py",),
    ],
)
def test_help_needs_no_config_and_no_jax(command):
    result = run("-X", "importtime", *command, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: python ")
    assert not {" jax\n", " absl\n"} & {
        f" {line.split()[-1]}\n" for line in result.stderr.splitlines()
    }


def test_an_unknown_command_is_one_line():
    assert "unknown command 'cuont'" in error_of("-m", "hunyuan_jax", "cuont")
    assert "commands are import, export, verify" in error_of("convert_torch.py", "exprt")


SMALL = (
    "--config.model.num_layers=1",
    "--config.model.cla_share_factor=1",
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=32",
    "--config.model.moe.num_experts=2",
    "--config.model.remat=none",
    "--config.train.batch_size=2",
)


@pytest.mark.heavy
def test_train_then_generate(tmp_path):
    """The README's path, shortened: train, look at the workdir, generate from it."""
    workdir = tmp_path / "run"
    steps = ("num_steps=2", "eval_batches=1", "seq_len=64")
    short = (*(f"--config.train.{step}" for step in steps), "--config.schedule.warmup_steps=1")
    result = run("train.py", TINY, *SMALL, *short, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert "step 2/2  loss" in result.stderr
    assert "validation loss" in result.stderr

    generate = (
        "-m",
        "hunyuan_jax",
        "generate",
        f"--checkpoint={workdir}",
        "--prompt=def ",
        "--max_new_tokens=8",
    )
    result = run(*generate)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def ")
    assert "(8 tokens in " in result.stderr


@pytest.mark.slow
def test_bench():
    result = run("-m", "hunyuan_jax", "bench", TINY, *SMALL, "--num_steps=1", "--json")
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["tokens_per_second"] == pytest.approx(figures["steps_per_second"] * 2 * 256)
    assert figures["prefill_tokens_per_second"] > 0
    assert figures["compile_seconds"] > 0
    assert 100 < figures["peak_memory_mb"] < 8000


@pytest.mark.cases(1)
@pytest.mark.parametrize("platform", ["cuda", "abacus"])
@pytest.mark.heavy
def test_a_platform_that_is_not_there_is_one_line(platform, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    line = error_of("-m", "hunyuan_jax", "bench", TINY)
    assert f"jax cannot open its devices with JAX_PLATFORMS={platform}: " in line
    assert "set it to cpu" in line
