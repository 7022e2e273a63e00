"""Options, their errors, paths with `~`, and the text of --help."""

import dataclasses
import subprocess
import sys

import pytest

from hunyuan_jax import cli, flags
from hunyuan_jax.config import field_names
from hunyuan_jax.config.section import meanings
from hunyuan_jax.config.train import TrainConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import AnyPath
from support import paths

TINY = f"--config={paths.ROOT / 'configs/tiny.py'}"


@flags.command(
    flags.Option("folder", AnyPath, "a folder.", is_required=True),
    flags.Option("count", int, "A number.", 3, minimum=1, maximum=5),
    flags.Option("kind", str, "A kind.", choices=("a", "b")),
    flags.Option("share", float, "A share.", default_meaning="half"),
    flags.JSON,
)
def example(values):
    """Does something.

    More about it.
    """
    seen.append(values)
    return 7


seen = []


def run(*arguments):
    return flags.run(example, "example", arguments)


def test_values_have_their_types_and_defaults():
    assert run("--folder=x", "--json", "--share=1") == 7
    values = seen.pop()
    assert vars(values) == {"folder": "x", "count": 3, "kind": None, "share": 1.0, "json": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"^--folder is missing; pass --folder=PATH: a folder\.$"),
        (("--folder=",), "--folder is missing"),
        (("--folder=x", "--count=6"), r"--count=6.*\[1, 5\]"),
        (("--folder=x", "--count=y"), "--count=y"),
        (("--folder=x", "--kind=c"), "--kind=c.*<a|b>"),
        (("--foldr=x",), "'foldr'.*folder"),
        (("x",), "unexpected argument 'x'; options are written --name=value"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)


def test_paths_are_expanded_and_other_text_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    run("--folder=~/runs")
    assert seen.pop().folder == f"{tmp_path}/runs"
    run("--folder=memory://bucket/~x")
    assert seen.pop().folder == "memory://bucket/~x"
    with pytest.raises(ConfigError, match=rf"^--config={tmp_path}/absent.py: no such file"):
        cli.run(["count", "--config=~/absent.py"])


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_the_config_takes_overrides(monkeypatch, capsys):
    arguments = ["count", TINY, "--config.model.num_layers=2", "--json"]
    monkeypatch.setattr(sys, "argv", ["hunyuan_jax", *arguments])  # where ml_collections looks
    assert cli.run(arguments) == 0
    small = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["hunyuan_jax", "count", TINY, "--json"])
    assert cli.run(["count", TINY, "--json"]) == 0
    assert capsys.readouterr().out != small


def test_help_of_a_command(capsys):
    assert run("--count=nothing", "--help") == 0
    assert capsys.readouterr().out == (
        "usage: example --folder=PATH [--OPTION=VALUE ...]\n"
        "\n"
        "Does something.\n"
        "\n"
        "More about it.\n"
        "\n"
        "options:\n"
        "  --folder=PATH  a folder. (required)\n"
        "  --count=N      A number. (default: 3)\n"
        "  --kind=a|b     A kind.\n"
        "  --share=X      A share. (default: half)\n"
        "  --json         Print one JSON object. (default: false)\n"
    )


def test_a_long_name_leaves_room_for_the_meanings_of_others(capsys):
    long = flags.Option("long", str, "Some.", choices=tuple("abcdefghijklmnopqrstuvwxyz"))

    @flags.command(flags.Option("short", int, "A number of the file.", 3), long)
    def command(values):
        """Does something."""

    assert flags.run(command, "command", ["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  --short=N  A number of the file. (default: 3)" in lines
    assert lines[-2:] == [f"  --long={'|'.join(long.choices)}", "             Some."]


def test_help_with_a_config_has_every_field_and_recipe(capsys):
    assert cli.run(["count", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in field_names():
        section, _, field = name.rpartition(".")
        start = text.index(f" config.{section}: ")
        assert f" {field} " in text[start:], name
    for field in dataclasses.fields(TrainConfig):
        assert f" {field.name} {meanings(TrainConfig)[field.name]}" in text
    assert "Stop after this many skipped steps in a row" in text and "(default: 20)" in text
    for path in (paths.ROOT / "configs").glob("*.py"):
        assert f" configs/{path.name} " in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    assert cli.run([name, "-h"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python -m hunyuan_jax {name} ")
    assert "absl" not in printed and "flagfile" not in printed


def test_the_list_of_commands(capsys):
    assert cli.run(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name}  " in listed for name in cli.COMMANDS if len(name) == 8)
    assert cli.run([]) == 2
    assert capsys.readouterr().out == listed
    with pytest.raises(ConfigError, match="unknown command 'cuont'; commands are count, bench"):
        cli.run(["cuont"])


def test_a_reader_that_has_seen_enough_is_no_error():
    """`train.py --help | head -1`, with more text behind it than a pipe holds."""
    code = (
        "from hunyuan_jax import flags; "
        "flags.exit_with_message(lambda: print(('x' * 100 + chr(10)) * 10_000) or 0)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
