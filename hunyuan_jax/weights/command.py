"""The commands `import`, `export`, `quantize` and `verify`."""

import sys

from hunyuan_jax import flags
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import AnyPath

_SOURCE = flags.Option(
    "source", AnyPath, "Official model folder, GGUF file or hub id.", is_required=True
)
_OUTPUT = flags.Option("output", AnyPath, "Folder or file to write.", is_required=True)
_CHECKPOINT = flags.Option(
    "checkpoint", AnyPath, "Converted checkpoint, or workdir of a run.", is_required=True
)


@flags.command(
    _SOURCE,
    _OUTPUT,
    flags.Option(
        "dtype",
        str,
        "Dtype of the parameters.",
        default_meaning="config.json's",
        choices=("float32", "bfloat16"),
    ),
)
def import_(values) -> int:
    """Converts safetensors or .bin shards to a checkpoint with its config and tokenizer."""
    from hunyuan_jax.weights import stream

    count = stream.import_model(values.source, values.output, values.dtype)
    print(f"{values.output}: complete; {count} tensors converted now.")
    return 0


@flags.command(
    _CHECKPOINT,
    _OUTPUT,
    flags.Option(
        "adapter",
        bool,
        "Write only the LoRA adapter of a run, for PEFT: adapter_config.json and "
        "adapter_model.safetensors.",
        False,
    ),
    flags.Option(
        "gguf",
        str,
        "Write one GGUF file for llama.cpp, with matrices in this type.",
        default_meaning="a folder",
        choices=("f32", "f16", "bf16", "q8_0", "q4_0"),
    ),
)
def export(values) -> int:
    """Writes a model as an official folder (names, dtypes and shards) or as a GGUF file, adapters
    merged.
    """
    if values.adapter and values.gguf:
        raise ConfigError("--adapter and --gguf are two formats; give one of them.")
    if values.gguf:
        from hunyuan_jax.weights.gguf_export import export_gguf

        num_bytes = export_gguf(values.checkpoint, values.output, values.gguf)
        print(f"{values.output}: complete, {num_bytes / 1e9:.3f} GB.")
        return 0
    if values.adapter:
        from hunyuan_jax.storage import Place
        from hunyuan_jax.weights import peft
        from hunyuan_jax.weights.run import Run

        run = Run(Place(values.checkpoint, "--checkpoint"))
        model_cfg, params = run.read_adapters()
        peft.write_adapter(values.output, model_cfg, params, run.config.train.init_from)
        for warning in peft.warnings(model_cfg):
            print(warning, file=sys.stderr)
        return 0
    from hunyuan_jax.weights.open import export_model

    count = export_model(values.checkpoint, values.output)
    print(f"{values.output}: complete; {count} files of weights written now.")
    return 0


@flags.command(
    flags.Option(
        "checkpoint",
        AnyPath,
        "Model folder, GGUF file, hub id, converted checkpoint or workdir of a run.",
        is_required=True,
    ),
    _OUTPUT,
    flags.Option(
        "method",
        str,
        "How projections and experts are stored.",
        is_required=True,
        choices=("easyquant", "int8", "int4", "fp8"),
    ),
)
def quantize(values) -> int:
    """Writes a model as a folder in few bits; needs no data.

    int8, int4 and fp8 are written in the format of compressed-tensors.
    """
    from hunyuan_jax.weights.quantize import quantize_model

    count, num_bytes = quantize_model(values.checkpoint, values.output, values.method)
    print(f"{values.output}: complete, {num_bytes / 1e9:.3f} GB; {count} files written now.")
    return 0


@flags.command(_SOURCE, _CHECKPOINT)
def verify(values) -> int:
    """Compares a converted checkpoint with its source, tensor by tensor, then layer by layer
    through both forward passes.
    """
    from hunyuan_jax.weights import verify as verify_lib

    differences = verify_lib.verify(values.source, values.checkpoint)
    for line in differences:
        print(line)
    print(
        f"{len(differences)} differences"
        if differences
        else f"{values.checkpoint} is {values.source}."
    )
    return 1 if differences else 0
