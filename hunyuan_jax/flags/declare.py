"""`@command` declares a command beside the code it calls; `run` and `run_one_of` start it."""

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import user_path
from pallas_kernels.select import Unsupported

_HELP = ("-h", "--help")


@dataclasses.dataclass(frozen=True)
class Option:
    """One `--name=value` of a command.

    type: str, int, float, bool, or `files.user_path` for a path.  default: None if the command
    decides; default_meaning then says what it decides.
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
        names = {int: "N", float: "X", user_path: "PATH"}
        return "|".join(self.choices) or names.get(self.type, "TEXT")


CONFIG = Option(
    "config",
    user_path,
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

    The function gets a namespace of its options' values: paths with `~` expanded, `config` as a
    Config.
    """
    return lambda function: Command(function, options)


def run(chosen: Command, program: str, arguments: Sequence[str]) -> int:
    """Runs a command with the words after its name, or prints its help; returns the exit status.

    Raises:
      ConfigError: a wrong option or config field, or what the command refuses.
    """
    if set(arguments) & {*_HELP}:
        from hunyuan_jax.flags import usage

        print(usage.command_help(program, chosen))
        return 0
    from hunyuan_jax.flags.parse import parse

    return chosen.function(parse(chosen.options, program, arguments))


def run_one_of(
    commands: Mapping[str, str], program: str, about: str, arguments: Sequence[str]
) -> int:
    """Runs the command that the first of `arguments` names, or prints what there is.

    Args:
      commands: name -> "module:attribute" of its Command, imported when it is needed.

    Raises:
      ConfigError: no such command, or as `run`.
    """

    def load(name: str) -> Command:
        module, attribute = commands[name].split(":")
        return getattr(importlib.import_module(module), attribute)

    if not arguments or arguments[0] in _HELP:
        from hunyuan_jax.flags import usage

        print(usage.list_help(program, about, {name: load(name) for name in commands}))
        return 0 if arguments else 2
    if arguments[0] not in commands:
        raise ConfigError(f"unknown command {arguments[0]!r}; commands are {', '.join(commands)}.")
    return run(load(arguments[0]), f"{program} {arguments[0]}", arguments[1:])


def exit_with_message(main: Callable[[], int]) -> NoReturn:
    """Runs main and exits with its status; what the user must change becomes a message and status
    2, without a traceback.
    """
    try:
        status = main()
        sys.stdout.flush()
    except (ConfigError, Unsupported) as e:
        print(f"error: {e}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        # At once: native threads that are still at work would abort the process when the
        # interpreter ends.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has seen enough.  Nothing is left to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141  # what a shell reports of a program that SIGPIPE ended
    sys.exit(status)
