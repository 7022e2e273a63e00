"""The commands `tokenize` and `data`."""

import json
import os
import time

from hunyuan_jax import flags
from hunyuan_jax.config import DataConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import AnyPath, LocalPath

_TOKENIZE = (
    flags.Option(
        "input",
        AnyPath,
        "folder, file or glob of text, local or a URL such as gs://...; or stdlib.",
        is_required=True,
    ),
    flags.Option(
        "output",
        LocalPath,
        "new folder, or one that an earlier attempt has begun.",
        is_required=True,
    ),
    flags.Option(
        "tokenizer",
        AnyPath,
        "byte, or a model folder, a tokenizer.json or a ranks file.",
        is_required=True,
    ),
    flags.Option(
        "text_field",
        str,
        "Field of .jsonl rows, or column of .parquet files, that holds the text.",
        DataConfig.text_field,
    ),
    flags.Option("num_workers", int, "Processes.", default_meaning="one for each core", minimum=1),
    flags.Option(
        "max_bad_fraction",
        float,
        "Stop above this share of unusable rows (of at least 1000).",
        DataConfig.max_bad_fraction,
        minimum=0.0,
        maximum=1.0,
    ),
    flags.Option(
        "shard_mb",
        int,
        "Megabytes of text per shard; a worker takes a few times that memory.",
        128,
        minimum=1,
    ),
    flags.Option(
        "runner",
        str,
        "Run as an Apache Beam pipeline on this runner: DirectRunner, DataflowRunner, "
        "FlinkRunner, ...",
    ),
    flags.Option(
        "beam_options",
        str,
        "Options of the pipeline, such as '--region=europe-west4 --project=p'.",
    ),
)


@flags.command(*_TOKENIZE, flags.JSON)
def tokenize(values) -> int:
    """Writes token shards of a text corpus; started again, it continues."""
    if values.beam_options and not values.runner:
        raise ConfigError(
            "--beam_options acts with --runner only; add --runner=NAME or leave it out."
        )
    if values.runner and values.num_workers is not None:
        raise ConfigError(
            "--num_workers is of this machine's processes; say it to the runner, in "
            "--beam_options."
        )
    from hunyuan_jax.data import shards

    job = shards.Job(
        input=values.input,
        output=values.output,
        tokenizer=values.tokenizer,
        text_field=values.text_field,
        max_bad_fraction=values.max_bad_fraction,
        shard_bytes=values.shard_mb * 2**20,
    )
    start = time.perf_counter()
    if values.runner:
        from hunyuan_jax.data import beam

        manifest = beam.tokenize(job, values.runner, (values.beam_options or "").split())
    else:
        from hunyuan_jax.data import tokenize as tokenize_lib

        manifest = tokenize_lib.tokenize(job, values.num_workers or os.cpu_count() or 1)
    seconds = time.perf_counter() - start
    if not values.json:
        from hunyuan_jax.data import tokens

        print(tokens.report_of(manifest))
    figures = {
        name: manifest[name] for name in ("num_documents", "num_tokens", "num_bytes", "num_bad")
    }
    figures |= {"shards": len(manifest["shards"]), "seconds": seconds}
    flags.print_result(figures, values.json)
    return 0


@flags.command(
    flags.CONFIG,
    flags.JSON,
    flags.Option("step", int, "Train step, as in metrics.jsonl: the first is 1.", minimum=1),
    flags.Option(
        "verify", bool, "Compare every token shard with the hash in its manifest.", False
    ),
)
def data(values) -> int:
    """Shows which documents are in the batch of train step --step, and how full its rows are; or
    with --verify checks token shards.
    """
    if (values.step is None) != values.verify:
        raise ConfigError("data needs --step=N or --verify, and not both.")
    from hunyuan_jax.data import loader
    from hunyuan_jax.tokenizer import load_tokenizer

    config = values.config
    if values.verify:
        damaged = loader.damaged_shards(config.data)
        print(
            json.dumps({"damaged": damaged})
            if values.json
            else "\n".join(damaged) or "every token shard is as its manifest says"
        )
        return 1 if damaged else 0
    order = loader.PackedRows(
        loader.open_corpus(config.data, load_tokenizer(config.data.tokenizer)),
        config.data,
        config.train,
    )
    described = {"step": values.step, **order.describe(values.step - 1)}
    if values.json:
        print(json.dumps(described))
        return 0
    print(order)
    print(
        f"\nstep {values.step}, phase {described['phase']}, {described['efficiency']:.2%} of its "
        "positions hold tokens"
    )
    for number, row in enumerate(described["rows"]):
        print(f"row {number}: {row['source']}, epoch {row['epoch']}")
        for part in row["documents"]:
            print(
                f"  {part['name']}, piece {part['piece']}, tokens {part['start']} to "
                f"{part['stop'] - 1}"
            )
    return 0
