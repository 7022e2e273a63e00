"""Which implementation of an operation runs: by name, by a list of names, or the first that can."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_log = logging.getLogger(__name__)


class Unsupported(ValueError):
    """No implementation of those asked for can serve the problem; the message says why for each."""


class Implementation(NamedTuple):
    """One way to compute an operation.

    name: "reference", "xla", "pallas_tpu", "pallas_gpu" (Mosaic GPU) or "pallas_triton".
    refuse: (device_kind, *shapes and settings of the operation) -> why it cannot serve them, or
    None if it can.
    run: what computes it.
    """

    name: str
    refuse: Callable[..., str | None]
    run: Any


def choose(
    operation: str,
    candidates: Sequence[Implementation],
    implementation: str | Sequence[str] | None,
    device_kind: str,
    *what: Any,
) -> Implementation:
    """The implementation that serves `what` on `device_kind`.

    Args:
      operation: its name, for messages.
      candidates: all implementations, the preferred first; the last serves everything.
      implementation: None takes the first candidate that can.  A name takes that one.  A list is
        tried in its order.
      device_kind: what jax calls the device, such as "TPU v5" or "NVIDIA H200"; taken from the
        mesh, since the process's own backend says nothing when a CPU compiles for a pod.
      *what: passed on to `refuse`.

    Raises:
      Unsupported: a name that does not exist, or none of those named can serve this.
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
        reason = by_name[name].refuse(device_kind, *what)
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


def whole_sublanes(head_dim: int) -> str | None:
    """Why a head dim is refused that the kernels do not tile, or None."""
    return (
        f"needs a head dim that is a multiple of 8, not {head_dim}; pad heads with zeros and pass "
        "scale"
        if head_dim % 8
        else None
    )


def only_on(family: str, device_kind: str) -> str | None:
    """Why a device is refused that is not of `family` ("TPU", "NVIDIA"), or None."""
    return None if device_kind.startswith(family) else f"needs a device of the family {family}"


def only_on_hopper(device_kind: str) -> str | None:
    """Why a device is refused that is no Hopper GPU, or None."""
    if reason := only_on("NVIDIA", device_kind):
        return reason
    is_hopper = any(name in device_kind for name in ("H100", "H200", "H800", "GH200"))
    return None if is_hopper else "needs a Hopper GPU (H100, H200, H800, GH200)"
