"""Runs the command that a command line names, or prints its help."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.flags import usage
from hunyuan_jax.flags.declare import Command
from pallas_kernels.select import Unsupported

_HELP = ("-h", "--help")


def run(
    chosen: Command,
    program: str,
    arguments: Sequence[str],
    complete: Callable[[dict], dict] | None = None,
) -> int:
    """Runs a command with the words after its name, or prints its help; returns the exit status.

    `complete`: fills in the recipe of --config, see `config.from_config_dict`.

    Raises:
      ConfigError: a wrong option or config field, or what the command refuses.
    """
    if set(arguments) & set(_HELP):
        print(usage.command_help(program, chosen))
        return 0
    # absl and ml_collections take their time to import.
    from hunyuan_jax.flags.parse import parse

    return chosen.function(parse(chosen.options, program, arguments, complete))


def run_one_of(
    commands: Mapping[str, str],
    program: str,
    about: str,
    arguments: Sequence[str],
    complete: Callable[[dict], dict] | None = None,
) -> int:
    """Runs the command that the first of `arguments` names, or prints what there is.

    Args:
      commands: name -> "module:attribute" of its Command, imported when it is needed.
      complete: as for `run`.

    Raises:
      ConfigError: no such command, or as `run`.
    """

    def load(name: str) -> Command:
        module, attribute = commands[name].split(":")
        return getattr(importlib.import_module(module), attribute)

    if not arguments or arguments[0] in _HELP:
        print(usage.list_help(program, about, {name: load(name) for name in commands}))
        return 0 if arguments else 2
    if arguments[0] not in commands:
        raise ConfigError(f"unknown command {arguments[0]!r}; commands are {', '.join(commands)}.")
    return run(load(arguments[0]), f"{program} {arguments[0]}", arguments[1:], complete)


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
    except Exception as e:
        if not _is_of_devices(e):
            raise
        asked = os.environ.get("JAX_PLATFORMS")
        print(
            "error: jax cannot open its devices"
            + (f" with JAX_PLATFORMS={asked}" if asked else "")
            + f": {' '.join(str(e).split()) or 'no such platform is installed'}. Unset "
            "JAX_PLATFORMS, set it to cpu, or install jax for the platform.",
            file=sys.stderr,
        )
        status = 2
    sys.exit(status)


def _is_of_devices(error: Exception) -> bool:
    """Whether jax raised the error while it opened its devices, in one of several types."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__") == "jax._src.xla_bridge"
