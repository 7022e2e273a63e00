"""`python -m hunyuan_jax`."""

import sys

from hunyuan_jax import cli, flags

flags.exit_with_message(lambda: cli.main(sys.argv))
