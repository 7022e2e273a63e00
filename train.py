"""Trains a model: python train.py --config=configs/tiny.py --workdir=runs/tiny."""

import sys

from hunyuan_jax import flags, malloc
from hunyuan_jax.cli import complete
from hunyuan_jax.files import LocalPath

_WORKDIR = flags.Option(
    "workdir",
    LocalPath,
    "folder of the run, such as runs/tiny: checkpoints, metrics, config.",
    is_required=True,
)


@flags.command(flags.CONFIG, _WORKDIR)
def train(values) -> int:
    """Trains the model of --config; the same command again continues from the newest checkpoint.

    Exit status: 0 done, 2 something the user must change. Ctrl-C and SIGTERM save, then stop.

    On a pod, run the same command on every host, with a --workdir they share.  TPU VMs, GKE,
    slurm, Open MPI and indexed Kubernetes jobs are recognised; elsewhere set
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    from hunyuan_jax.post.build import build_objective
    from hunyuan_jax.train import loop

    return loop.run(values.config, values.workdir, build_objective)


if __name__ == "__main__":
    malloc.restart_with_huge_pages()
    flags.exit_with_message(lambda: flags.run(train, "python train.py", sys.argv[1:], complete))
