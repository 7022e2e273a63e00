"""`python -m hunyuan_jax COMMAND`: the table of commands. Each room declares its own."""

import sys
from collections.abc import Sequence
from typing import Any

from hunyuan_jax import flags, malloc

COMMANDS = {
    "count": "hunyuan_jax.model.command:count",
    "bench": "hunyuan_jax.bench.command:bench",
    "generate": "hunyuan_jax.infer.command:generate",
    "chat": "hunyuan_jax.infer.command:chat",
    "serve": "hunyuan_jax.serve.command:serve",
    "eval": "hunyuan_jax.evals.command:evaluate",
    "export": "hunyuan_jax.weights.command:export",
    "quantize": "hunyuan_jax.weights.command:quantize",
    "plan": "hunyuan_jax.plan.command:plan",
    "report": "hunyuan_jax.report.command:report",
    "tokenize": "hunyuan_jax.data.command:tokenize",
    "data": "hunyuan_jax.data.command:data",
}


def complete(recipe: dict[str, Any]) -> dict[str, Any]:
    """Fills in what a recipe takes from the weights that it starts from."""
    from hunyuan_jax.train import start

    return start.complete(recipe)


def run(arguments: Sequence[str]) -> int:
    """Runs the command that the first argument names; returns the exit status.

    Raises:
      ConfigError: no such command, or what the command refuses.
    """
    about = "Trains, inspects and runs Hunyuan models. Training itself is `python train.py`."
    return flags.run_one_of(COMMANDS, "python -m hunyuan_jax", about, arguments, complete)


def main() -> None:
    """The console script `hunyuan-jax`."""
    malloc.restart_with_huge_pages()
    flags.exit_with_message(lambda: run(sys.argv[1:]))
