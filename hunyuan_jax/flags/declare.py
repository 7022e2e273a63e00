"""`@command` declares a command and its options beside the code it calls."""

import dataclasses
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from hunyuan_jax.files import AnyPath, LocalPath


@dataclasses.dataclass(frozen=True)
class Option:
    """One `--name=value` of a command.

    type: str, int, float, bool, or a kind of path (`files.LocalPath`, `files.AnyPath`).  default:
    None if the command decides; default_meaning then says what it decides.
    """

    name: str
    type: Callable[[Any], Any]
    meaning: str
    default: Any = None
    default_meaning: str = ""
    is_required: bool = False
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None

    @property
    def placeholder(self) -> str:
        """What stands for the value in a usage line."""
        names = {int: "N", float: "X", LocalPath: "PATH", AnyPath: "PATH"}
        return "|".join(self.choices) or names.get(self.type, "TEXT")


CONFIG = Option(
    "config",
    LocalPath,
    "Recipe, such as configs/tiny.py; override any field with --config.SECTION.FIELD=VALUE.",
    is_required=True,
)
JSON = Option("json", bool, "Print one JSON object.", False)


@dataclasses.dataclass(frozen=True)
class Command:
    """A function of the options' values that returns an exit status; its docstring is the help."""

    function: Callable[[SimpleNamespace], int]
    options: tuple[Option, ...]

    @property
    def about(self) -> str:
        """What the command does."""
        return inspect.cleandoc(self.function.__doc__)


def command(*options: Option) -> Callable[[Callable[[SimpleNamespace], int]], Command]:
    """Decorator that makes a function a Command.

    The function gets a namespace of its options' values: paths as `files.user_path` gives
    them, `config` as a Config.
    """
    return lambda function: Command(function, options)
