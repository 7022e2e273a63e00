"""Official PyTorch weights in and out: python convert_torch.py import|export|verify --NAME=VALUE
...

  import --source=HF_DIR --output=DIR [--dtype=bfloat16]
      safetensors or .bin shards to a checkpoint, config and tokenizer
  export --checkpoint=DIR --output=HF_DIR
      the official names, dtypes and shards again
  verify --source=HF_DIR --checkpoint=DIR
      tensor by tensor, then layer by layer through both forward passes

Folders are local paths or fsspec URLs.  The same command again continues one that was killed.
Exit status: 0 done, 1 verify found differences, 2 something the user must change.
"""

import sys

from absl import flags as absl_flags

from hunyuan_jax import flags
from hunyuan_jax.errors import ConfigError

_FLAGS = {
    "import": ("source", "output"),
    "export": ("checkpoint", "output"),
    "verify": ("source", "checkpoint"),
}
_HELP = {
    "source": "Official model folder.",
    "output": "Folder to write.",
    "checkpoint": "Converted checkpoint, or --workdir of a run.",
}


def main() -> int:
    """Runs the subcommand that the first argument names."""
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in _FLAGS:
        raise ConfigError(
            f"the first argument is {sys.argv[1:2] or 'missing'}; it must be one of "
            f"{', '.join(_FLAGS)}."
        )
    command = sys.argv[1]

    def define(values):
        for name in _FLAGS[command]:
            absl_flags.DEFINE_string(name, None, _HELP[name], flag_values=values)
        if command == "import":
            absl_flags.DEFINE_enum(
                "dtype",
                None,
                ["float32", "bfloat16"],
                "Of the parameters; default: config.json's.",
                flag_values=values,
            )

    values = flags.parse([f"convert_torch.py {command}", *sys.argv[2:]], define)
    for name in _FLAGS[command]:
        if not getattr(values, name):
            raise ConfigError(
                f"--{name} is missing; {command} needs "
                f"{' and '.join(f'--{n}=...' for n in _FLAGS[command])}."
            )
    if command == "import":
        from hunyuan_jax.weights import stream

        count = stream.import_model(values.source, values.output, values.dtype)
        print(f"{values.output}: complete; {count} tensors converted now.")
        return 0
    if command == "export":
        from hunyuan_jax.weights.open import export_model

        count = export_model(values.checkpoint, values.output)
        print(f"{values.output}: complete; {count} files of weights written now.")
        return 0
    from hunyuan_jax.weights import verify

    differences = verify.verify(values.source, values.checkpoint)
    for line in differences:
        print(line)
    print(
        f"{len(differences)} differences"
        if differences
        else f"{values.checkpoint} is {values.source}."
    )
    return 1 if differences else 0


if __name__ == "__main__":
    flags.exit_with_message(main)
