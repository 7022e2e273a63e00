"""The text of `--help`."""

import ast
import dataclasses
import shutil
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hunyuan_jax.config import Config
from hunyuan_jax.config.section import field_types, meanings
from hunyuan_jax.flags.declare import CONFIG, Command, Option

_RECIPES = Path(__file__).parents[2] / "configs"


def command_help(program: str, command: Command) -> str:
    """Usage, purpose and options of a command; with --config also its fields and the recipes."""
    required = [f"--{o.name}={o.placeholder}" for o in command.options if o.is_required]
    overrides = ["[--config.SECTION.FIELD=VALUE ...]"] * (CONFIG in command.options)
    optional = ["[--OPTION=VALUE ...]"] * (len(required) < len(command.options))
    usage = " ".join(["usage:", program, *required, *overrides, *optional])
    parts = [usage, command.about, "options:", *_table(map(_option_row, command.options))]
    if CONFIG in command.options:
        if recipes := _table(_recipe_rows()):
            parts += ["", "recipes:", *recipes]
        parts += ["", "config fields, set with --config.SECTION.FIELD=VALUE:"]
        for section in _sections(Config):
            parts += ["", f"config.{section.section}: {_summary(section.__doc__)}"]
            parts += _table(_field_rows(section))
    return "\n".join([parts[0], "", parts[1], "", *parts[2:]])


def list_help(program: str, about: str, commands: Mapping[str, Command]) -> str:
    """Usage, purpose and the commands of a program that has several."""
    rows = [(name, _summary(command.about)) for name, command in commands.items()]
    return "\n".join(
        [
            f"usage: {program} COMMAND --option=value ...",
            "",
            about,
            "",
            "commands:",
            *_table(rows),
            "",
            f"{program} COMMAND --help shows the options of a command.",
        ]
    )


def _option_row(option: Option) -> tuple[str, str]:
    name = f"--{option.name}" + f"={option.placeholder}" * (option.type is not bool)
    default = "" if option.default is None else f"{option.default}".lower()
    default = option.default_meaning or default
    note = " (required)" if option.is_required else f" (default: {default})" if default else ""
    return name, option.meaning + note


def _recipe_rows() -> Iterator[tuple[str, str]]:
    """Of a checkout; an installed package has no recipes."""
    for path in sorted(_RECIPES.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        yield f"configs/{path.name}", _summary(docstring)


def _sections(cls: type) -> Iterator[type]:
    """The sections of a run's config, inner ones after their outer one."""
    for hint in field_types(cls).values():
        if dataclasses.is_dataclass(hint):
            yield hint
            yield from _sections(hint)


def _field_rows(section: type) -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(section):
        hint = field_types(section)[field.name]
        if dataclasses.is_dataclass(hint):
            continue
        is_required = field.default is dataclasses.MISSING
        default = "no default" if is_required else f"default: {_shown(field.default)}"
        is_choice = typing.get_origin(hint) is typing.Literal
        choices = f" One of {', '.join(typing.get_args(hint))}." if is_choice else ""
        yield field.name, f"{meanings(section)[field.name]}{choices} ({default})"


def _shown(value: Any) -> str:
    """A default as one would type it."""
    return (value or '""') if isinstance(value, str) else str(value)


def _summary(docstring: str) -> str:
    """The first paragraph, on one line."""
    return " ".join(docstring.split("\n\n")[0].split())


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of two columns, as wide as the terminal allows.  A name that takes more than a third
    has a line of its own.
    """
    width = min(99, shutil.get_terminal_size((99, 1)).columns)
    rows = list(rows)
    names = [len(name) for name, _ in rows if len(name) <= width // 3]
    indent = 4 + max(names, default=0)
    lines = []
    for name, text in rows:
        column = f"  {name}".ljust(indent)
        if len(column) > indent:
            lines.append(column)
            column = " " * indent
        lines += textwrap.wrap(
            text,
            width,
            initial_indent=column,
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
            break_long_words=False,
        )
    return lines
