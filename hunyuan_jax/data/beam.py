"""Tokenising as an Apache Beam pipeline, for text beyond one machine: the units of `tokenize`, by whatever runner.

The shards are those of `tokenize`, byte for byte, and either continues what the other has begun.  Input and output are paths that all
workers see.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hunyuan_jax.config import ConfigError
from hunyuan_jax.data import shards, source
from hunyuan_jax.data import tokenize as local
from hunyuan_jax.data import tokens as tokens_lib


def tokenize(job: shards.Job, runner: str, options: Sequence[str]) -> dict[str, Any]:
    """Does what is left of a job by `runner` with pipeline `options`; returns the manifest.

    Raises:
      ConfigError: apache_beam is not installed, no such runner or option, no text, too many bad rows, or an output folder of another job.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ConfigError("--runner needs Apache Beam: pip install 'hunyuan_jax[beam]'.") from error
    plan = local.prepare(job)
    if plan is None:
        return tokens_lib.read_manifest(job.output)
    left = [
        (dataclasses.asdict(job), number, [dataclasses.astuple(span) for span in unit])
        for number, unit in enumerate(plan.units)
        if shards.read_report(job, number) is None
    ]
    try:
        pipeline = beam.Pipeline(runner=runner, options=PipelineOptions(list(options)))
    except (ValueError, SystemExit) as error:
        raise ConfigError(f"--runner={runner} with --beam_options={' '.join(options)!r} is refused: {error}") from error
    with pipeline:
        _ = pipeline | beam.Create(left) | beam.Reshuffle() | beam.Map(_run_unit)
    return shards.finish(job, len(plan.units), plan.settings)


def _run_unit(element: tuple[dict[str, Any], int, list[tuple]]) -> None:
    """Plain values in, so that a runner needs to know none of our classes."""
    job, number, spans = element
    shards.run_unit(shards.Job(**job), number, [source.Span(*span) for span in spans])
