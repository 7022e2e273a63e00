"""Tokenising as an Apache Beam pipeline, for text beyond one machine: the units of `tokenize`, by
whatever runner.

The shards are those of `tokenize`, byte for byte, and either continues what the other has begun.
All workers see the input and, at the same path, the output folder: a shared file system, or a
mounted bucket.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hunyuan_jax.data import shards, source
from hunyuan_jax.data import tokenize as local
from hunyuan_jax.data import tokens as tokens_lib
from hunyuan_jax.errors import ConfigError


def tokenize(job: shards.Job, runner: str, options: Sequence[str]) -> dict[str, Any]:
    """Does what is left of a job by `runner` with pipeline `options`; returns the manifest.

    Raises:
      ConfigError: apache_beam is not installed, no such runner or option, a runner that fails, no
        text, too many bad rows, or an output folder of another job or another command.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ConfigError("--runner needs Apache Beam: pip install -e '.[beam]'.") from error
    plan = local.prepare(job)
    if plan is None:
        return tokens_lib.read_manifest(job.output)
    left = [
        (dataclasses.asdict(job), number, [dataclasses.astuple(span) for span in unit])
        for number, unit in enumerate(plan.units)
        if shards.read_report(job, number) is None
    ]
    refused = f"--runner={runner} with --beam_options={' '.join(options)!r} is refused"
    try:
        parsed = PipelineOptions(list(options))
        pipeline = beam.Pipeline(runner=runner, options=parsed)
        known, given = (
            parsed.get_all_options(),
            parsed.get_all_options(retain_unknown_options=True),
        )
    except ValueError as error:
        raise ConfigError(f"{refused}: {error}") from error
    except SystemExit as error:  # of argparse, which has said why
        raise ConfigError(f"{refused}, see above.") from error
    if given.keys() - known.keys():
        raise ConfigError(
            f"{refused}: Beam has no option {', '.join(sorted(given.keys() - known.keys()))}."
        )
    with shards.alone(job):
        try:
            with pipeline:
                _ = pipeline | beam.Create(left) | beam.Reshuffle() | beam.Map(_run_unit)
        except RuntimeError as error:  # a runner that is not there, or what a worker has raised
            raise ConfigError(
                f"--runner={runner} has failed; the same command continues. "
                f"{' '.join(str(error).split())[-1000:]}"
            ) from error
        return shards.finish(job, len(plan.units), plan.settings)


def _run_unit(element: tuple[dict[str, Any], int, list[tuple]]) -> None:
    """Plain values in, so that a runner needs to know none of our classes."""
    job, number, spans = element
    shards.run_unit(shards.Job(**job), number, [source.Span(*span) for span in spans])
