"""What the processes of a run agree on: batch rows, errors, settings and the step to stop at."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from hunyuan_jax.errors import ConfigError

_MESSAGE_BYTES = 2048


def is_first() -> bool:
    """Whether this process writes what a run writes once: config, metrics, progress."""
    return jax.process_index() == 0


def spans_processes(mesh: Mesh) -> bool:
    """Whether the devices of a mesh belong to several processes."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def coordinator_host() -> str:
    """Returns the name or address of process 0's host by which the processes have met."""
    # Private, but the only place that has what jax has detected.
    from jax._src import distributed

    return distributed.global_state.coordinator_address.rpartition(":")[0].strip("[]")


def process_rows(
    sharding: NamedSharding, shape: tuple[int, ...], process_index: int | None = None
) -> np.ndarray:
    """Returns the rows of dim 0 that one process holds of an array of `shape`: int64, ascending.

    They follow from the mesh.  They need not be consecutive: on a torus a host's chips form a box,
    while a mesh axis is a line.  Processes that differ only along an axis that does not split the
    batch hold the same rows.

    Args:
      sharding: of the array.
      shape: of the whole array.
      process_index: this process if None.
    """
    process_index = jax.process_index() if process_index is None else process_index
    indices = [
        index
        for device, index in sharding.devices_indices_map(shape).items()
        if device.process_index == process_index
    ]
    return np.unique(np.concatenate([np.arange(shape[0])[index[0]] for index in indices]))


def global_batch(
    batch: Mapping[str, np.ndarray],
    shardings: Mapping[str, NamedSharding],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, jax.Array]:
    """Returns arrays of `shapes` over all processes, each made of the processes' own rows (those
    of `process_rows`, in that order).
    """
    return {
        name: jax.make_array_from_process_local_data(shardings[name], array, shapes[name])
        for name, array in batch.items()
    }


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Barrier: if one process raises inside, all of them raise.

    For work without collectives only: a process that has raised takes part in none.

    Raises:
      ConfigError: another process has raised, with its message.
    """
    error = None
    try:
        yield
    except Exception as e:
        error = e
    if jax.process_count() > 1:
        messages = gathered(
            ""
            if error is None
            else str(error)
            if isinstance(error, ConfigError)
            else f"{type(error).__name__}: {error}"
        )
        if error is None and any(messages):
            index = next(index for index, message in enumerate(messages) if message)
            raise ConfigError(f"process {index} of {len(messages)} has stopped: {messages[index]}")
    if error is not None:
        raise error


def gathered(text: str) -> list[str]:
    """Returns the texts of all processes, each cut to 2048 bytes; a barrier."""
    if jax.process_count() == 1:
        return [text]
    encoded = text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(encoded, np.uint8))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def broadcast_from_first(value: int) -> int:
    """Returns process 0's value, an int32, on every process; a barrier."""
    return (
        value
        if jax.process_count() == 1
        else int(multihost_utils.broadcast_one_to_all(np.int32(value)))
    )


def bytes_from_first(data: bytes, num_bytes: int) -> bytes:
    """Returns process 0's data on every process; a barrier.

    Args:
      data: of the other processes are not read.
      num_bytes: in process 0's data, known to all.
    """
    if jax.process_count() == 1:
        return data
    found = np.frombuffer(data, np.uint8) if is_first() else np.zeros(num_bytes, np.uint8)
    return multihost_utils.broadcast_one_to_all(found).tobytes()


def least(value: int) -> int:
    """Returns the smallest of the processes' values; a barrier."""
    return min(map(int, gathered(str(value))))


def require_same(**values: Any) -> None:
    """Checks that JSON-serialisable values are equal on all processes.

    Raises:
      ConfigError: they differ; it names the first such value and the processes that differ from
        process 0.
    """
    if jax.process_count() == 1:
        return
    digests = [
        hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).digest()
        for value in values.values()
    ]
    gathered = multihost_utils.process_allgather(
        np.frombuffer(b"".join(digests), np.uint8).reshape(len(values), 8)
    )
    for index, name in enumerate(values):
        differing = [
            process
            for process, row in enumerate(gathered[:, index])
            if (row != gathered[0, index]).any()
        ]
        if differing:
            raise ConfigError(
                f"processes {differing} see another {name} than process 0 (here: "
                f"{str(values[name])[:200]}); all hosts must agree. "
                "Start the same command everywhere; the files that it reads must be the same, "
                "and --workdir must be on a filesystem that all of them share."
            )


def reached_stop(call: int, received: bool) -> bool:
    """Whether to save and stop now; `call` counts the calls, alike in all processes.

    A single process stops as soon as it has `received` a signal.  With several, jax passes a
    SIGTERM of one process to all and picks the first call that none of them has passed.  A check
    takes microseconds and waits for nobody until there is a signal; a collective would make the
    hosts wait for each other in every step.
    """
    return (
        received
        if jax.process_count() == 1
        else multihost_utils.reached_preemption_sync_point(call)
    )
