"""The command `plan`."""

import dataclasses
import json
import sys

from hunyuan_jax import flags
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import LocalPath
from hunyuan_jax.infer.command import MAX_CONTEXT, MESH, QUANTIZE, mesh_config

SERVING = (
    dataclasses.replace(MESH, default_meaning="kv heads, then experts, then rows"),
    dataclasses.replace(
        QUANTIZE,
        default_meaning="none",
        choices=("int8", "int4", "fp8", "easyquant", "w8a8", "w8a8-fp8"),
    ),
    flags.Option("max_rows", int, "Answers at the same time.", default_meaning="64", minimum=1),
    MAX_CONTEXT,
)
_OPTIONS = (
    flags.Option(
        "topology",
        str,
        "GENERATION:SHAPE of a slice, such as v5p:4x8x8; for several slices set "
        "config.mesh.num_slices.",
    ),
    flags.Option(
        "batch_per_chip",
        int,
        "Sequences per device (half a chip on tpu7x), or per config.mesh.context devices.",
        default_meaning="the config's batch; 1 with --fit; 1, 2 and 4 with --search",
        minimum=1,
    ),
    flags.Option(
        "search",
        bool,
        "Rank meshes, remat policies, batches and optimizer dtypes on --topology.",
        False,
    ),
    flags.Option(
        "compile_top",
        int,
        "--search: compile this many of the best.",
        default_meaning="3",
        minimum=0,
    ),
    flags.Option(
        "fit",
        bool,
        "Find the smallest slice of each TPU generation on which the config trains.",
        False,
    ),
    flags.Option("generation", str, "--fit: this TPU generation only."),
    flags.Option(
        "fast",
        bool,
        "Compile without the SparseCores: memory and compute, but no all-in time.",
        False,
    ),
    flags.Option("html", LocalPath, "Also write a page with the timeline of the step."),
    flags.Option(
        "serve", bool, "Compile the server's programs instead: what fits, and bounds.", False
    ),
    *(dataclasses.replace(option, meaning=f"--serve: {option.meaning}") for option in SERVING),
)


@flags.command(flags.CONFIG, flags.JSON, *_OPTIONS)
def plan(values) -> int:
    """Compiles the train step for a TPU slice, or a server's programs, on this machine: memory,
    estimated time and collectives.
    """
    if values.serve:
        return _serve(values)
    for option in SERVING:
        if getattr(values, option.name) is not None:
            raise ConfigError(f"--{option.name} acts with --serve only; add it or leave it out.")
    if values.search and values.fit:
        raise ConfigError("--search and --fit are two questions; ask one at a time.")
    for option, mode in (("compile_top", "search"), ("generation", "fit")):
        if getattr(values, option) is not None and not getattr(values, mode):
            raise ConfigError(f"--{option} acts with --{mode} only; add --{mode} or leave it out.")
    if (values.topology is None) != values.fit:
        raise ConfigError(
            "--fit walks over all slices; leave --topology out."
            if values.fit
            else "--topology is missing, such as --topology=v5p:4x8x8."
        )
    for option in ("search", "fit", "html"):
        if values.fast and getattr(values, option):
            raise ConfigError(
                f"--fast leaves out the all-in time and some memory, which --{option} needs; "
                "leave one of them out."
            )
    if values.html and (values.search or values.fit):
        raise ConfigError("--html draws one step; leave out --search and --fit.")
    from hunyuan_jax.plan import aot, page, search, show, topology

    config, batch = values.config, values.batch_per_chip
    if values.fit:
        if values.generation not in (None, *topology.SLICES):
            raise ConfigError(
                f"--generation={values.generation} is not one of {', '.join(topology.SLICES)}."
            )
        generations = [values.generation] if values.generation else list(topology.SLICES)
        trials = search.fit(config, generations, batch or 1)
        title = "Slices up to the smallest of each generation on which the config trains"
    elif values.search:
        num_compiled = 3 if values.compile_top is None else values.compile_top
        batches = [batch] if batch else [1, 2, 4]
        trials = search.search(config, values.topology, batches, num_compiled)
        title = f"Ways to run the config on {values.topology}, best first"
    else:
        if batch:
            num_devices = topology.num_devices(values.topology, config.mesh.num_slices)
            config = search.with_batch(config, num_devices, batch)
        report = aot.report(config, values.topology, values.fast)
        if values.html:
            page.write(report, values.html)
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


def _serve(values) -> int:
    for option in ("search", "html", "fast", "batch_per_chip", "compile_top"):
        if getattr(values, option):
            raise ConfigError(f"--{option} is about training; leave it or --serve out.")
    if (values.topology is None) != values.fit:
        raise ConfigError("--serve needs --topology, such as --topology=v6e:4x8, or --fit.")
    if values.fit and values.mesh is not None:
        raise ConfigError("--fit chooses the mesh of each slice; leave --mesh out.")
    from hunyuan_jax.infer.request import Limits
    from hunyuan_jax.plan import serving, topology
    from hunyuan_jax.weights import few_bits

    mesh = None if values.mesh is None else mesh_config(values.mesh)
    limits = Limits(max_rows=values.max_rows or 64, max_context=values.max_context)
    model = values.config.model
    if not values.fit:
        found = [serving.report(model, values.topology, mesh, limits, values.quantize)]
    else:
        names = [values.generation] if values.generation else list(topology.SLICES)
        if values.generation not in (None, *topology.SLICES):
            raise ConfigError(
                f"--generation={values.generation} is not one of {', '.join(topology.SLICES)}."
            )
        few_bits.check_method(model, values.quantize, "--quantize")
        found = []
        for name in names:
            try:
                found.append(serving.smallest(model, name, limits, values.quantize))
            except ConfigError as error:
                if values.generation:
                    raise
                print(f"note: {name} is left out: {error}", file=sys.stderr)
        found = [report for report in found if report is not None]
    if values.json:
        print(json.dumps([dataclasses.asdict(report) for report in found]))
        return 0
    for report in found:
        serving.print_report(report)
    return 0
