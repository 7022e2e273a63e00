"""Command lines: commands with their options, `--config` with overrides, and help.

Imports no jax; absl and ml_collections are imported only when a command line is parsed.
"""

from hunyuan_jax.flags.declare import (
    CONFIG,
    JSON,
    Command,
    Option,
    command,
)
from hunyuan_jax.flags.output import print_result
from hunyuan_jax.flags.run import exit_with_message, run, run_one_of

__all__ = [
    "CONFIG",
    "JSON",
    "Command",
    "Option",
    "command",
    "exit_with_message",
    "print_result",
    "run",
    "run_one_of",
]
