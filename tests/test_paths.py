"""Paths of the user: `user_path` reads every option, config field and argument that is one."""

import ast
import dataclasses
import importlib
import importlib.util
import os
import re
import shutil

import fsspec
import jax
import numpy as np
import pytest

import hunyuan_jax
from hunyuan_jax import cli, config, flags
from hunyuan_jax.config import section
from hunyuan_jax.config.data import SourceConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import AnyPath, LocalPath, user_path
from hunyuan_jax.flags.parse import parse
from hunyuan_jax.report import page
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.train import loop
from hunyuan_jax.weights import peft
from hunyuan_jax.weights.open import export_model
from hunyuan_jax.weights.stream import import_model
from support import paths

# Of ml_collections.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

TINY = f"--config={paths.ROOT / 'configs/tiny.py'}"
MODEL = paths.GOLDEN / "hf/moe_top1"
KINDS = (LocalPath, AnyPath)

# Options and fields that are text and not paths.  A new one goes here, or gets a kind of path.
TEXT_OPTIONS = {
    "api_key",
    "beam_options",
    "cache_dtype",
    "depths",
    "dtype",
    "generation",
    "gguf",
    "host",
    "lengths",
    "mesh",
    "method",
    "model_name",
    "prompt",
    "quantize",
    "runner",
    "system",
    "tasks",  # of which paths of .yaml go through user_path
    "text_field",
    "topology",
}
TEXT_FIELDS = {
    "data.phases.name",
    "data.sources.name",
    "data.text_field",
    "model.kernels",
    "objective.dpo.online.criterion",
    "objective.dpo.online.endpoint",  # a URL
    "objective.dpo.online.endpoint_model",
    "train.profile_steps",
    "train.wandb_project",
}
# Functions with a path from their caller, who has read it by user_path.
INTERNAL = {
    "checkpoint/manifest.py",
    "checkpoint/owner.py",
    "checkpoint/store.py",
    "data/shards.py",
    "data/tokens.py",
    "files.py",
    "runlog/goodput.py",
    "runlog/log.py",
    "runlog/metrics.py",
    "train/loop.py: __init__",  # of the trainer; `run` reads the path
    "train/loop.py: _owned_together",
    "train/start.py: keep_files",
}


def script(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", paths.ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands():
    """Name -> Command of everything that a user can type."""
    named = cli.COMMANDS | {
        f"convert {name}": target for name, target in script("convert_torch").COMMANDS.items()
    }
    found = {"train": script("train").train}
    for name, target in named.items():
        module, attribute = target.split(":")
        found[name] = getattr(importlib.import_module(module), attribute)
    return found


COMMANDS = commands()
PATH_OPTIONS = [
    pytest.param(command, option, id=f"{name} --{option.name}")
    for name, command in COMMANDS.items()
    for option in command.options
    if option.type in KINDS and option.name != "config"
]


def value_of(command, option, text):
    """What the command gets for `option`, the others being valid."""
    valid = {"config": TINY.partition("=")[2], "method": "int8"}
    arguments = [
        f"--{other.name}={valid.get(other.name, 'x')}"
        for other in command.options
        if other.is_required and other is not option
    ]
    return getattr(
        parse(command.options, "program", [*arguments, f"--{option.name}={text}"]), option.name
    )


def test_every_option_that_is_text_is_known_to_be_no_path():
    options = [option for command in COMMANDS.values() for option in command.options]
    assert {option.name for option in options if option.type is str} <= TEXT_OPTIONS
    assert {option.name for option in options if option.type in KINDS} >= {
        "workdir",
        "checkpoint",
        "source",
        "output",
        "input",
        "tokenizer",
        "config",
    }


@pytest.mark.parametrize(("command", "option"), PATH_OPTIONS)
def test_every_option_is_expanded_and_takes_urls_or_refuses_them(command, option, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of")
    assert value_of(command, option, "~/x") == "/home/of/x"
    assert value_of(command, option, "file:///tmp/x") == "/tmp/x"
    name = f"^--{option.name} = "
    if option.type is AnyPath:
        assert value_of(command, option, "memory://b/~x") == "memory://b/~x"
        with pytest.raises(ConfigError, match=name + "'nowhere://b' cannot be used"):
            value_of(command, option, "nowhere://b")
    else:
        with pytest.raises(ConfigError, match=name + "'memory://b/x' is a URL; only a path"):
            value_of(command, option, "memory://b/x")
    with pytest.raises(ConfigError, match=name + ".*lost a slash.*: gs://b/x"):
        value_of(command, option, "gs:/b/x")
    with pytest.raises(ConfigError, match=name + ".*unknown user; write ./~nobody-here/x"):
        value_of(command, option, "~nobody-here/x")


def fields(cls=config.Config, prefix=""):
    for name, hint in section.field_types(cls).items():
        items = getattr(hint, "__args__", ())
        inner = next((kind for kind in (hint, *items) if dataclasses.is_dataclass(kind)), None)
        if inner:
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def test_every_field_that_is_text_is_known_to_be_no_path():
    assert {name for name, hint in fields() if hint is str} == TEXT_FIELDS
    assert {name for name, hint in fields() if hint in KINDS} == {
        "checkpoint.mirror",
        "data.source",
        "data.sources.path",
        "data.tokenizer",
        "objective.distill.inherit_from",
        "objective.distill.teacher",
        "objective.dpo.online.prompts",
        "objective.dpo.online.reward_model",
        "train.init_from",
    }


def test_a_field_is_expanded_when_its_section_is_built(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of")
    assert config.TrainConfig(init_from="~/x").init_from == "/home/of/x"
    assert config.DataConfig(source="~/x/*.txt", tokenizer="byte").source == "/home/of/x/*.txt"
    assert SourceConfig("a", "gs://b/~x").path == "gs://b/~x"
    with pytest.raises(ConfigError, match=r"^config\.checkpoint\.mirror = 'gs:/b' is a URL that"):
        config.CheckpointConfig(mirror="gs:/b")


def test_a_refused_command_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for command, arguments in (
        (COMMANDS["train"], [TINY, "--workdir=gs://b/x"]),
        (COMMANDS["tokenize"], ["--input=stdlib", "--tokenizer=byte", "--output=gs://b/x"]),
        (COMMANDS["report"], ["--workdir=~nobody-here/x"]),
        (COMMANDS["convert export"], [f"--checkpoint={MODEL}", "--output=nowhere://b/x"]),
    ):
        with pytest.raises(ConfigError, match=r"^--(workdir|output) = "):
            flags.run(command, "program", arguments)
    assert os.listdir(tmp_path) == []


def test_every_function_that_takes_a_path_reads_it_alike():
    """A public function of the package with a path calls `user_path`, or a function that does."""
    readers = {"user_path", "Place", "open_model", "load_tokenizer"}
    readers |= {"read_adapter", "load", "load_params", "model_place"}
    missing = []
    for path in sorted((paths.ROOT / "hunyuan_jax").rglob("*.py")):
        name = path.relative_to(paths.ROOT / "hunyuan_jax").as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            annotations = [ast.unparse(a.annotation) for a in node.args.args if a.annotation]
            if not any("PathLike" in text for text in annotations):
                continue
            called = {
                getattr(call.func, "id", getattr(call.func, "attr", ""))
                for call in ast.walk(node)
                if isinstance(call, ast.Call)
            }
            if not called & readers and not {name, f"{name}: {node.name}"} & INTERNAL:
                missing.append(f"{name}: {node.name}")
    assert missing == []


@pytest.mark.parametrize(
    "call",
    [
        lambda path: hunyuan_jax.load(path),
        lambda path: hunyuan_jax.from_pretrained(path),
        lambda path: hunyuan_jax.from_pretrained(MODEL, adapter=path),
        lambda path: load_tokenizer(path),
        lambda path: loop.run(None, path),
        lambda path: page.write(path),
        lambda path: import_model(MODEL, path),
        lambda path: export_model(MODEL, path),
        lambda path: peft.write_adapter(path, config_of_lora(), {}, ""),
    ],
    ids=["load", "model", "adapter", "tokenizer", "train", "report", "import", "export", "peft"],
)
def test_a_function_refuses_what_the_command_refuses(call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"begins with the home of an unknown user"):
        call("~nobody-here/x")
    with pytest.raises(ConfigError, match=r"lost a slash, as pathlib\.Path does to URLs"):
        call(paths.Path("gs://bucket/x"))
    assert os.listdir(tmp_path) == []


def config_of_lora():
    model = hunyuan_jax.presets.tiny()
    return dataclasses.replace(model, lora=config.LoraConfig(rank=2))


@pytest.mark.heavy
def test_models_at_home_and_behind_urls_are_the_same(monkeypatch, tmp_path):
    """Read and written with their tokenizers."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "there"
    shutil.copytree(MODEL, folder)
    remote = fsspec.filesystem("memory")
    for file in MODEL.iterdir():
        remote.pipe_file(f"/models/moe/{file.name}", file.read_bytes())
    expected = hunyuan_jax.load(MODEL)
    settings = hunyuan_jax.Sampling(max_new_tokens=3, temperature=0)
    for path in ("~/there", "memory://models/moe", f"file://{folder}"):
        found = hunyuan_jax.load(path)
        assert found.tokenizer.fingerprint() == expected.tokenizer.fingerprint()
        assert found.tokenizer.chat_template == expected.tokenizer.chat_template
        jax.tree.map(np.testing.assert_array_equal, found.model.params, expected.model.params)
    assert found.generate("The fox", settings) == expected.generate("The fox", settings)
    expected.model.save_pretrained("~/out")
    expected.model.save_pretrained("memory://models/out")
    assert export_model("memory://models/moe", "~/exported") >= 1
    written = (tmp_path / "out/config.json").read_bytes()
    assert remote.cat_file("/models/out/config.json") == written
    assert not (tmp_path / "~").exists()
    with pytest.raises(ConfigError, match=r"memory://models/none'? cannot be read|holds no"):
        load_tokenizer("memory://models/none")


def test_what_is_no_path_stays():
    for word in ("", "byte", "stdlib", "/a/~b", "./~b", "a:b/c", "C:/x", "gs://b/x*.txt"):
        assert user_path(user_path(word, "a", AnyPath), "a", AnyPath) == word
    with pytest.raises(ConfigError, match="holds a NUL"):
        user_path("a\0b", "a")


def test_a_folder_named_like_a_scheme_or_a_home_can_be_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gs:").mkdir()
    (tmp_path / "~nobody-here").mkdir()
    for path in ("gs:/x", "~nobody-here/x"):
        assert user_path(path, "a") == path
    assert re.fullmatch(r"/.*", user_path("~", "a"))
