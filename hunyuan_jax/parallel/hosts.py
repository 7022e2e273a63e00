"""What several processes of a run must agree on: their rows of a batch, errors, settings, and the
step to stop at.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from hunyuan_jax.errors import ConfigError

_MESSAGE_BYTES = 2048


def is_first() -> bool:
    """Whether this is the process that writes what a run writes once: config, metrics, progress."""
    return jax.process_index() == 0


def process_rows(
    sharding: NamedSharding, shape: tuple[int, ...], process_index: int | None = None
) -> np.ndarray:
    """Rows of dim 0 that a process (this one if None) holds of an array of `shape`, int64 and
    rising.

    They follow from the mesh.  On a torus they need not be consecutive: a host's chips are a box,
    an axis of the mesh is a line. Processes may share rows, where they only differ along an axis
    that does not split the batch.
    """
    process_index = jax.process_index() if process_index is None else process_index
    indices = [
        index
        for device, index in sharding.devices_indices_map(shape).items()
        if device.process_index == process_index
    ]
    return np.unique(np.concatenate([np.arange(shape[0])[index[0]] for index in indices]))


def global_batch(
    batch: dict[str, np.ndarray], sharding: NamedSharding, shape: tuple[int, ...]
) -> dict[str, jax.Array]:
    """Arrays of `shape` over all processes, each made of the processes' own rows (those of
    `process_rows`, in that order).
    """
    return jax.make_array_from_process_local_data(sharding, batch, shape)


@contextlib.contextmanager
def raised_by_all() -> Iterator[None]:
    """An error that one process meets inside is raised by all of them, who would wait for it for
    ever; also waits for the others.

    For work without collectives: a process that raises takes part in none.

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
    """The texts of all processes, cut to 2048 bytes; also waits for the others."""
    if jax.process_count() == 1:
        return [text]
    encoded = text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(encoded, np.uint8))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def first_says(value: int) -> int:
    """The value of process 0, on all of them; an int32."""
    return (
        value
        if jax.process_count() == 1
        else int(multihost_utils.broadcast_one_to_all(np.int32(value)))
    )


def require_same(**values: Any) -> None:
    """Checks that JSON-serialisable values are equal on all processes.

    Raises:
      ConfigError: they are not, naming the first and the processes that differ from process 0.
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
                "Start the same command everywhere, with the same text and a --workdir on a "
                "filesystem that all of them share."
            )


def reached_stop(step: int, received: bool) -> bool:
    """Whether to save and stop after `step`: alone as soon as this process has `received` a
    signal, else where all agreed to.

    Among several, jax hands a SIGTERM of one to all and picks the first step that none has passed;
    call this once a step.  Asking costs microseconds and waits for nobody until there is a signal,
    where a collective would have the hosts wait for every step.
    """
    return (
        received
        if jax.process_count() == 1
        else multihost_utils.reached_preemption_sync_point(step)
    )
