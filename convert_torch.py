"""Official PyTorch weights in and out: python convert_torch.py import|export|verify."""

import sys

from hunyuan_jax import flags

COMMANDS = {
    "import": "hunyuan_jax.weights.command:import_",
    "export": "hunyuan_jax.weights.command:export",
    "verify": "hunyuan_jax.weights.command:verify",
}
ABOUT = """Converts official PyTorch weights to a checkpoint and back.

Folders are local paths or fsspec URLs; a source may be a hub id, ORG/NAME.
The same command again continues one that was killed.
Exit status: 0 done, 1 verify found differences, 2 something the user must change."""

if __name__ == "__main__":
    flags.exit_with_message(
        lambda: flags.run_one_of(COMMANDS, "python convert_torch.py", ABOUT, sys.argv[1:])
    )
