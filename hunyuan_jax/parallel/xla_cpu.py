"""What is chosen for the CPU's compiler, from the mesh's devices."""

# Layers that are compiled one by one.  Compile time grows with them: 10 instead of 9 s for 4
# layers of configs/bench.py.
_MAX_UNROLLED = 8


def unroll(device_kind: str, num_groups: int, group_size: int) -> int:
    """Returns how many groups of layers a step of the loop over groups runs.

    XLA:CPU copies what a loop reads and writes of stacked arrays, or fuses the slice with what
    reads it, which then is not vectorised.  Up to 8 layers are therefore run without a loop: 912
    instead of 1017 ms of CPU time for a training step of configs/bench.py (jax 0.10.2).
    """
    is_short = num_groups * group_size <= _MAX_UNROLLED
    return num_groups if device_kind == "cpu" and is_short else 1


def takes_counts(device_kind: str) -> bool:
    """Whether experts are told how many rows of their buffers are in use.

    On a CPU they are not: nothing is skipped there, and the rows that are not in use are zero.
    """
    return device_kind != "cpu"


def train_step_options(device_kind: str) -> dict[str, bool]:
    """Compiler options of the train step.

    By default XLA:CPU copies both moments of every parameter before it updates them in place.
    Looking at what a loop or fusion really reads spares that: 24 instead of 42 ms of CPU time for
    the update of 15 M parameters, with 19 instead of 116 MB beside them (jax 0.10.2).
    """
    return {"xla_cpu_copy_insertion_use_region_analysis": True} if device_kind == "cpu" else {}
