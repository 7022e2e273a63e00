"""`python -m hunyuan_jax COMMAND`: parse, call, print."""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags as absl_flags

from hunyuan_jax import flags
from hunyuan_jax.config import MeshConfig
from hunyuan_jax.errors import ConfigError


def main(argv: list[str]) -> int:
    """Runs one command; `argv` is sys.argv.

    Raises:
      ConfigError: no such command, or what the command refuses.
    """
    names = ", ".join(COMMANDS)
    if len(argv) < 2 or argv[1] in ("-h", "--help"):
        print("usage: python -m hunyuan_jax COMMAND --option=value ...\n")
        for name, command in COMMANDS.items():
            print(f"  {name:10s}{command.__doc__.splitlines()[0]}")
        return 0 if len(argv) > 1 else 2
    if argv[1] not in COMMANDS:
        raise ConfigError(f"unknown command {argv[1]!r}; commands are {names}.")
    return COMMANDS[argv[1]]([f"hunyuan_jax {argv[1]}", *argv[2:]])


def count(argv: list[str]) -> int:
    """Parameters (total, active), training FLOPs and KV cache bytes per token of --config."""
    values = flags.parse(argv, _define(flags.define_config, _json))
    config = flags.config_of(values)
    from hunyuan_jax.model import count as count_lib

    result = dataclasses.asdict(count_lib.count(config.model, config.train.seq_len))
    _print_table(result, values.json)
    return 0


def bench(argv: list[str]) -> int:
    """Training and prefill speed, compile time and peak memory of --config on this machine."""

    def num_steps(values):
        absl_flags.DEFINE_integer(
            "num_steps", 20, "Timed steps.", lower_bound=1, flag_values=values
        )

    values = flags.parse(argv, _define(flags.define_config, _json, num_steps))
    config = flags.config_of(values)
    from hunyuan_jax import bench as bench_lib

    _print_table(bench_lib.bench(config, values.num_steps), values.json)
    return 0


def generate(argv: list[str]) -> int:
    """Continues --prompt with the model of --checkpoint (a run's workdir or a model folder),
    printing as it goes.
    """

    def options(values):
        absl_flags.DEFINE_string("prompt", None, "Text to continue.", flag_values=values)

    values = flags.parse(argv, _define(_model_options, options))
    if not values.checkpoint or not values.prompt:
        raise ConfigError("generate needs --checkpoint=DIR and a non-empty --prompt=TEXT.")
    from hunyuan_jax.infer import text

    start, num_tokens = time.perf_counter(), 0
    with _values_are_settings():
        pieces = text.stream(
            *text.load(values.checkpoint, values.tokenizer, _mesh(values)),
            values.prompt,
            **_sampling(values),
        )
        print(values.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
            num_tokens += 1
    print()
    print(
        f"({num_tokens} tokens in {time.perf_counter() - start:.1f} s with loading and compiling)",
        file=sys.stderr,
    )
    return 0


def chat(argv: list[str]) -> int:
    """Talks with the model of --checkpoint: /reset forgets, Ctrl-C stops an answer, Ctrl-D leaves;
    or questions come from a pipe.
    """

    def options(values):
        absl_flags.DEFINE_string("system", "", "The system message.", flag_values=values)

    values = flags.parse(argv, _define(_model_options, options))
    if not values.checkpoint:
        raise ConfigError("chat needs --checkpoint=DIR.")
    from hunyuan_jax.infer import text

    with _values_are_settings():
        model, vocabulary = text.load(values.checkpoint, values.tokenizer, _mesh(values))
        conversation = text.Chat(model, vocabulary, values.system, **_sampling(values))
        for question in _questions():
            if question == "/reset":
                conversation.reset()
            elif question:
                _print_answer(conversation.ask(question))
    return 0


def _questions() -> Iterator[str]:
    """Lines of a terminal, or of a pipe, until they end."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401  (gives input() a history and editing keys)

    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _print_answer(pieces: Iterator[str]) -> None:
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
    print(flush=True)


@contextlib.contextmanager
def _values_are_settings() -> Iterator[None]:
    """A ValueError of the library, here about what a flag said, is the user's to change."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _model_options(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_string(
        "checkpoint",
        None,
        "Workdir of a run, or a folder with official weights.",
        flag_values=values,
    )
    absl_flags.DEFINE_string(
        "tokenizer",
        None,
        "'byte', a folder or a file; default: that of the checkpoint.",
        flag_values=values,
    )
    absl_flags.DEFINE_string(
        "mesh",
        None,
        "Axes to spread the model over, such as expert:2,tensor:4.",
        flag_values=values,
    )
    absl_flags.DEFINE_integer(
        "max_new_tokens", 256, "At most this many tokens.", flag_values=values
    )
    absl_flags.DEFINE_float("temperature", 0.8, "0 is greedy.", flag_values=values)
    absl_flags.DEFINE_integer("top_k", 20, "0 is off.", flag_values=values)
    absl_flags.DEFINE_float("top_p", 0.95, "1 is off.", flag_values=values)
    absl_flags.DEFINE_float("repetition_penalty", 1.0, "1 is off.", flag_values=values)
    absl_flags.DEFINE_integer("seed", 0, "Of the draws.", flag_values=values)


def _sampling(values: absl_flags.FlagValues) -> dict[str, Any]:
    return {
        name: values[name].value
        for name in (
            "max_new_tokens",
            "temperature",
            "top_k",
            "top_p",
            "repetition_penalty",
            "seed",
        )
    }


def _mesh(values: absl_flags.FlagValues) -> Any:
    """The mesh of --mesh over all devices, or None."""
    if values.mesh is None:
        return None
    names = [field.name for field in dataclasses.fields(MeshConfig) if field.name != "num_slices"]
    pairs = [part.split(":") for part in values.mesh.split(",")]
    wrong = next(
        (
            ":".join(pair)
            for pair in pairs
            if len(pair) != 2 or pair[0] not in names or not pair[1].isdecimal()
        ),
        None,
    )
    if wrong is not None:
        raise ConfigError(
            f"--mesh={values.mesh}: {wrong!r} is no AXIS:SIZE; axes are {', '.join(names)}."
        )
    from hunyuan_jax.parallel.mesh import make_mesh

    return make_mesh(
        MeshConfig(**dict.fromkeys(names, 1) | {name: int(size) for name, size in pairs})
    )


def export(argv: list[str]) -> int:
    """Writes the model of --checkpoint as an official folder (adapters merged), or with --adapter
    the LoRA adapter alone, for PEFT.
    """

    def options(values):
        absl_flags.DEFINE_string(
            "checkpoint",
            None,
            "Workdir of a run; without --adapter also a model folder.",
            flag_values=values,
        )
        absl_flags.DEFINE_string("output", None, "Folder to write.", flag_values=values)
        absl_flags.DEFINE_boolean(
            "adapter",
            False,
            "Write adapter_config.json and adapter_model.safetensors.",
            flag_values=values,
        )

    values = flags.parse(argv, _define(options))
    if not values.checkpoint or not values.output:
        raise ConfigError("export needs --checkpoint=DIR and --output=DIR.")
    if values.adapter:
        from hunyuan_jax.weights import peft as peft_io
        from hunyuan_jax.weights.run import Run

        run = Run(values.checkpoint)
        model_cfg, params = run.read_adapters()
        peft_io.write_adapter(values.output, model_cfg, params, run.config.train.init_from)
        if warning := peft_io.peft_warning(model_cfg):
            print(warning, file=sys.stderr)
    else:
        from hunyuan_jax.weights.open import export_model

        export_model(values.checkpoint, values.output)
    return 0


def plan(argv: list[str]) -> int:
    """Compiles the train step of --config for the TPU slice --topology, here: memory, estimated
    time, collectives.
    """
    values = flags.parse(argv, _define(flags.define_config, _json, _plan_options))
    config = flags.config_of(values)
    if values.search and values.fit:
        raise ConfigError("--search and --fit are two questions; ask one at a time.")
    for option, mode in (("compile_top", "search"), ("generation", "fit")):
        if values[option].present and not values[mode].value:
            raise ConfigError(f"--{option} acts with --{mode} only; add --{mode} or leave it out.")
    if (values.topology is None) != values.fit:
        raise ConfigError(
            "--fit walks over all slices; leave --topology out."
            if values.fit
            else "--topology is missing, such as --topology=v5p:4x8x8."
        )
    from hunyuan_jax.plan import aot, search, show, topology

    batch = values.batch_per_chip
    if values.fit:
        generations = [values.generation] if values.generation else list(topology.SLICES)
        trials = search.fit(config, generations, batch or 1)
        title = "Slices up to the smallest of each generation on which the config trains"
    elif values.search:
        trials = search.search(
            config, values.topology, [batch] if batch else [1, 2, 4], values.compile_top
        )
        title = f"Ways to run the config on {values.topology}, best first"
    else:
        if batch:
            config = search.with_batch(
                config, topology.num_devices(values.topology, config.mesh.num_slices), batch
            )
        report = aot.report(config, values.topology)
        if values.json:
            print(json.dumps(show.report_data(report)))
        else:
            show.print_report(report)
        return 0
    if values.json:
        print(json.dumps(show.trials_data(trials)))
    else:
        show.print_trials(trials, title)
    return 0


def _plan_options(values: absl_flags.FlagValues) -> None:
    from hunyuan_jax.plan.topology import SLICES

    def define(kind, name, default, text, *args, **kwargs):
        kind(name, default, *args, text, flag_values=values, **kwargs)

    define(
        absl_flags.DEFINE_string,
        "topology",
        None,
        "GENERATION:SHAPE, such as v5p:4x8x8; for several: config.mesh.num_slices.",
    )
    batch = "Sequences a device (half a chip on tpu7x); default: the config's batch, with --fit 1, with --search 1, 2 and 4."
    define(absl_flags.DEFINE_integer, "batch_per_chip", None, batch, lower_bound=1)
    define(
        absl_flags.DEFINE_boolean,
        "search",
        False,
        "Rank meshes, remat policies, batches and optimizer dtypes on --topology.",
    )
    define(
        absl_flags.DEFINE_integer,
        "compile_top",
        3,
        "--search: compile so many of the best.",
        lower_bound=0,
    )
    define(
        absl_flags.DEFINE_boolean,
        "fit",
        False,
        "Find the smallest slice of each TPU generation on which the config trains.",
    )
    define(
        absl_flags.DEFINE_enum,
        "generation",
        None,
        "--fit: this generation only.",
        list(SLICES),
    )


def report(argv: list[str]) -> int:
    """One HTML page about the run in --workdir: curves, goodput, expert load, config; also while
    it runs.
    """

    def options(values):
        absl_flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
        absl_flags.DEFINE_string(
            "output", None, "File to write; default: WORKDIR/report.html.", flag_values=values
        )

    values = flags.parse(argv, _define(options))
    if not values.workdir:
        raise ConfigError(
            "--workdir is missing; pass the folder of a run, such as --workdir=runs/tiny."
        )
    from hunyuan_jax.report import page as report_lib

    print(report_lib.write(values.workdir, values.output))
    return 0


def tokenize(argv: list[str]) -> int:
    """Makes token shards of the text --input in the folder --output; started again, it continues."""

    def options(values):
        def define(kind, name, default, text, **kwargs):
            kind(name, default, text, flag_values=values, **kwargs)

        share = {"lower_bound": 0.0, "upper_bound": 1.0}
        define(
            absl_flags.DEFINE_string,
            "input",
            None,
            "Folder, file or glob of text, gs://... too; or stdlib.",
        )
        define(
            absl_flags.DEFINE_string,
            "output",
            None,
            "New folder, or one that an earlier attempt has begun.",
        )
        define(
            absl_flags.DEFINE_string,
            "tokenizer",
            None,
            "'byte', or a model folder, a tokenizer.json or a ranks file.",
        )
        define(
            absl_flags.DEFINE_string,
            "text_field",
            "text",
            "Field of .jsonl rows, column of .parquet files.",
        )
        define(
            absl_flags.DEFINE_integer,
            "num_workers",
            os.cpu_count() or 1,
            "Processes.",
            lower_bound=1,
        )
        define(
            absl_flags.DEFINE_float,
            "max_bad_fraction",
            0.01,
            "Stop above this share of bad rows (of at least 1000).",
            **share,
        )
        define(
            absl_flags.DEFINE_integer,
            "shard_mb",
            128,
            "Text in a shard; a worker takes a few times that memory.",
            lower_bound=1,
        )
        define(
            absl_flags.DEFINE_string,
            "runner",
            None,
            "Run as an Apache Beam pipeline: DirectRunner, DataflowRunner, FlinkRunner, ...",
        )
        define(
            absl_flags.DEFINE_string,
            "beam_options",
            None,
            "Of the pipeline, such as '--region=europe-west4 --project=p'.",
        )

    values = flags.parse(argv, _define(options, _json))
    for name in ("input", "output", "tokenizer"):
        if not values[name].value:
            raise ConfigError(
                f"--{name} is missing; tokenize needs --input=TEXT, --output=DIR and "
                "--tokenizer=byte or a path."
            )
    if values.beam_options and not values.runner:
        raise ConfigError(
            "--beam_options acts with --runner only; add --runner=NAME or leave it out."
        )
    if values.runner and values["num_workers"].present:
        raise ConfigError(
            "--num_workers is of this machine's processes; say it to the runner, in "
            "--beam_options."
        )
    from hunyuan_jax.data import shards

    job = shards.Job(
        input=values.input,
        output=os.path.expanduser(values.output),
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

        manifest = tokenize_lib.tokenize(job, values.num_workers)
    seconds = time.perf_counter() - start
    if not values.json:
        from hunyuan_jax.data import tokens

        print(tokens.report_of(manifest))
    names = ("num_documents", "num_tokens", "num_bytes", "num_bad")
    _print_table(
        {name: manifest[name] for name in names}
        | {"shards": len(manifest["shards"]), "seconds": seconds},
        values.json,
    )
    return 0


def data(argv: list[str]) -> int:
    """Which documents are in the batch of train step --step of --config, and how full its rows
    are; --verify checks token shards.
    """

    def options(values):
        absl_flags.DEFINE_integer(
            "step", None, "As in metrics.jsonl: the first is 1.", lower_bound=1, flag_values=values
        )
        absl_flags.DEFINE_boolean(
            "verify",
            False,
            "Compare every token shard with the manifest's hash.",
            flag_values=values,
        )

    values = flags.parse(argv, _define(flags.define_config, _json, options))
    config = flags.config_of(values)
    if (values.step is None) != values.verify:
        raise ConfigError("data needs --step=N or --verify, and not both.")
    from hunyuan_jax.data import loader
    from hunyuan_jax.tokenizer import load_tokenizer

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


COMMANDS = {
    "count": count,
    "bench": bench,
    "generate": generate,
    "chat": chat,
    "export": export,
    "plan": plan,
    "report": report,
    "tokenize": tokenize,
    "data": data,
}


def _define(
    *parts: Callable[[absl_flags.FlagValues], None],
) -> Callable[[absl_flags.FlagValues], None]:
    def define(values):
        for part in parts:
            part(values)

    return define


def _json(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_boolean("json", False, "Print one JSON object.", flag_values=values)


def _print_table(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        shown = (
            f"{value:,.4g}"
            if isinstance(value, float) and value < 100
            else f"{value:,.0f}"
            if isinstance(value, int | float)
            else value
        )
        print(f"{name.replace('_', ' '):32s}{shown}")
