"""`python -m hunyuan_jax`."""

from hunyuan_jax import cli

cli.main()
