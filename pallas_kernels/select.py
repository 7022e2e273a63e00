"""Chooses the implementation of an operation: by name, from a list, or the first that can."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_log = logging.getLogger(__name__)


class Unsupported(ValueError):
    """No requested implementation can serve the problem; the message says why for each."""


class Implementation(NamedTuple):
    """One way to compute an operation.

    name: "reference", "xla", "pallas_tpu", "pallas_gpu" (Mosaic GPU) or "pallas_triton".
    refuse: (device_kind, *problem) -> None if it can serve the problem, else the reason.
    run: the function or module that computes it.
    """

    name: str
    refuse: Callable[..., str | None]
    run: Any


def choose(
    operation: str,
    candidates: Sequence[Implementation],
    implementation: str | Sequence[str] | None,
    device_kind: str,
    *problem: Any,
) -> Implementation:
    """Returns the implementation that serves `problem` on `device_kind`, and logs it once.

    Args:
      operation: name of the operation, for messages.
      candidates: all implementations in order of preference; the last serves everything.
      implementation: None for the first candidate that can, a name, or a list of names in order
        of preference.
      device_kind: jax's name for the device, such as "TPU v5" or "NVIDIA H200".  Take it from the
        mesh: the process's own backend is wrong when a CPU compiles for a pod.
      *problem: shapes and settings, passed to `refuse`.

    Raises:
      Unsupported: an unknown name, or no named implementation can serve the problem.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    names = (
        list(by_name)
        if implementation is None
        else [implementation]
        if isinstance(implementation, str)
        else list(implementation)
    )
    reasons = []
    for name in names:
        if name not in by_name:
            raise Unsupported(
                f"{operation} has no implementation {name!r}; it has {', '.join(by_name)}, or "
                "None for the best that can."
            )
        reason = by_name[name].refuse(device_kind, *problem)
        if reason is None:
            _log_once(operation, name, device_kind)
            return by_name[name]
        reasons.append(f"{name}: {reason}")
    raise Unsupported(
        f"{operation} on {device_kind!r}: "
        + "; ".join(reasons)
        + ". Use implementation=None for the best that can."
    )


@functools.cache
def _log_once(operation: str, name: str, device_kind: str) -> None:
    _log.info("%s on %s: %s", operation, device_kind, name)


def refuse_head_dim(head_dim: int) -> str | None:
    """Returns why the kernels cannot tile a head dim, or None if they can."""
    return (
        f"needs a head dim that is a multiple of 8, not {head_dim}; pad heads with zeros and pass "
        "scale"
        if head_dim % 8
        else None
    )


def only_on(family: str, device_kind: str) -> str | None:
    """Returns why a device is refused unless it is of `family` ("TPU", "NVIDIA"), or None."""
    return None if device_kind.startswith(family) else f"needs a device of the family {family}"


def only_on_hopper(device_kind: str) -> str | None:
    """Returns why a device is refused unless it is a Hopper GPU, or None."""
    if reason := only_on("NVIDIA", device_kind):
        return reason
    is_hopper = any(name in device_kind for name in ("H100", "H200", "H800", "GH200"))
    return None if is_hopper else "needs a Hopper GPU (H100, H200, H800, GH200)"
