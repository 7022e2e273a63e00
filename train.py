"""Trains a model: python train.py --config=configs/tiny.py --workdir=runs/tiny
[--config.section.field=value ...]

The same command again continues from the newest checkpoint.  Exit status: 0 done, 2 something the
user must change.

On a pod, run the same command on every host, with a --workdir they share.  TPU VMs, GKE, slurm,
Open MPI and indexed Kubernetes jobs are recognised; elsewhere set JAX_COORDINATOR_ADDRESS
(host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import sys

from absl import flags as absl_flags

from hunyuan_jax import flags
from hunyuan_jax.errors import ConfigError


def main() -> int:
    """Reads the command line and runs the training loop; configuration is checked before jax is
    imported.
    """

    def define(values):
        flags.define_config(values)
        absl_flags.DEFINE_string(
            "workdir", None, "Folder of the run: checkpoints, metrics, config.", flag_values=values
        )

    values = flags.parse(sys.argv, define)
    config = flags.config_of(values)
    if not values.workdir:
        raise ConfigError(
            "--workdir is missing; pass a folder for checkpoints and metrics, such as "
            "--workdir=runs/tiny."
        )
    from hunyuan_jax.train import loop

    return loop.run(config, values.workdir)


if __name__ == "__main__":
    flags.exit_with_message(main)
