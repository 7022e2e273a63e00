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
