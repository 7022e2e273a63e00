"""The devices of a run: joining the processes it was started as, and the mesh of four named axes
over all their devices.
"""

import math
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from hunyuan_jax.config import MeshConfig
from hunyuan_jax.errors import ConfigError

AXES = ("replica", "data", "expert", "tensor")  # by rising traffic, as mesh_utils expects them

# Environment variables are how launchers speak to a process, so they are read here and nowhere
# else.  Of these three jax 0.10 to 0.12 reads the address alone.
_TOLD = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_TPU_WORKERS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


def join_processes() -> None:
    """Calls `jax.distributed.initialize` if this process was started as one of several; comes
    before the first use of a device.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, set on
    every host, always work.  Without them jax detects TPU pods (TPU VMs and GKE), slurm, Open MPI
    and indexed Kubernetes jobs.  Whether there is anything to detect is decided from the
    environment and the PCI bus, so nothing waits for a network on a machine without TPUs.

    Raises:
      ConfigError: the three variables are incomplete or wrong, or the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    told = {name: os.environ[name] for name in _TOLD if name in os.environ}
    is_told = (
        "JAX_NUM_PROCESSES" in told or "JAX_PROCESS_ID" in told
    )  # which comes before what jax would find
    reason = None if is_told else _launcher(os.environ, has_tpu=_has_tpu())
    if reason:
        arguments = {}
    elif told:
        reason, arguments = (
            ", ".join(f"{name} = {value}" for name, value in told.items()),
            _arguments(told),
        )
    else:
        return
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError, OSError) as e:
        raise ConfigError(
            f"the environment ({reason}) says that this is one of several processes, but joining "
            f"them failed: {e} "
            f"Start the same command on every host, or set {', '.join(_TOLD)} "
            "(JAX_NUM_PROCESSES=1 for a run of its own)."
        ) from e


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `cfg` over `devices` (all of them if None); -1 takes what is left.

    On TPUs each axis is laid along the torus, the axes with more traffic first; one that is no
    product of the torus' dims takes parts of them.  `replica` spans the slices.  Elsewhere the
    devices are taken in their order.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, the slices are not those of
        the devices, or there is no such mesh on this torus.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_sizes(cfg, len(devices))
    is_tpu = devices[0].platform == "tpu"
    if (
        is_tpu or cfg.num_slices > 1
    ):  # a host of GPUs calls itself a slice, which says nothing about its network
        _check_slices(cfg, sizes, devices)
        array = _torus_mesh(cfg, sizes, devices)
    else:
        array = np.asarray(devices).reshape(sizes)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def single_device_mesh() -> Mesh:
    """All axes of size one, on the first device of this process: what a notebook uses."""
    return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])


def device_kind(mesh: Mesh | AbstractMesh) -> str:
    """What jax calls the devices of a mesh, such as "TPU v5" or "cpu"; "" for an abstract mesh,
    which has none.

    Kernels and compiler options are chosen by this: the process's own backend says nothing when a
    CPU plans a pod.
    """
    return mesh.devices.flat[0].device_kind if isinstance(mesh, Mesh) else ""


def resolve_sizes(cfg: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Axis sizes in the order of AXES, with -1 replaced.

    Raises:
      ConfigError: they do not multiply to `num_devices`.
    """
    sizes = [getattr(cfg, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    resolved = tuple(num_devices // fixed if size == -1 else size for size in sizes)
    if math.prod(resolved) != num_devices:
        text = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"config.mesh = {text} does not use the {num_devices} devices exactly; "
            "the sizes must multiply to that number. Set one axis to -1 to let it take what is "
            "left."
        )
    return resolved


def _check_slices(cfg: MeshConfig, sizes: tuple[int, ...], devices: list[jax.Device]) -> None:
    # Devices of a lone slice may have no slice_index.
    found = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if found != cfg.num_slices:
        raise ConfigError(
            f"config.mesh.num_slices = {cfg.num_slices}, but the {len(devices)} devices form "
            f"{found} slice(s); "
            f"the two must be equal. Set config.mesh.num_slices to {found} and "
            "config.mesh.replica to a multiple of it."
        )
    replica = sizes[AXES.index("replica")]
    if replica % cfg.num_slices:
        raise ConfigError(
            f"config.mesh.replica = {replica} is not divisible by config.mesh.num_slices = "
            f"{cfg.num_slices}; replica is the axis that "
            f"spans the slices. Set it to a multiple of {cfg.num_slices}."
        )


def _torus_mesh(cfg: MeshConfig, sizes: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Devices [replica, data, expert, tensor]; mesh_utils knows the tori and where a slice's order
    pays.
    """
    between = (cfg.num_slices, 1, 1, 1)
    inside = tuple(size // num for size, num in zip(sizes, between, strict=True))
    try:
        # Split dims are needed: the 16 experts of v5p:4x8x8 are no product of 4, 8 and 8.
        if cfg.num_slices > 1:
            return mesh_utils.create_hybrid_device_mesh(
                inside, between, devices, allow_split_physical_axes=True
            )
        return mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    except (
        AssertionError,
        NotImplementedError,
        TypeError,
        ValueError,
    ) as e:  # what it raises for holes, cores, unequal slices, primes
        text = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"config.mesh = {text} cannot be laid out on these {len(devices)} devices "
            f"({devices[0].device_kind}): {str(e)[:300]} "
            "The devices must fill a whole box of the torus, and each axis takes whole factors of "
            "its sides; use sizes that are products "
            "of those, such as powers of two."
        ) from e


def _has_tpu() -> bool:
    """Whether jax takes this machine for a TPU VM: libtpu is installed, chips are on the PCI bus,
    and JAX_PLATFORMS wants them.
    """
    # Private, but the very variable its cluster detection asks; a guess of ours could differ from
    # it.
    from jax._src import cloud_tpu_init

    platforms = jax.config.jax_platforms
    return cloud_tpu_init.running_in_cloud_tpu_vm and (not platforms or "tpu" in platforms)


def _launcher(env: Mapping[str, str], has_tpu: bool) -> str | None:
    """What says that there are several processes which jax can find by itself, or None for a
    process alone.
    """
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return f"OMPI_COMM_WORLD_SIZE = {env['OMPI_COMM_WORLD_SIZE']}"
    if all(name in env for name in _SLURM) and int(env["SLURM_NTASKS"]) > 1:
        return f"SLURM_NTASKS = {env['SLURM_NTASKS']}"
    if has_tpu:
        if int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1:
            return f"MEGASCALE_NUM_SLICES = {env['MEGASCALE_NUM_SLICES']}"
        if "TPU_PROCESS_ADDRESSES_PATH" in env:
            return f"TPU_PROCESS_ADDRESSES_PATH = {env['TPU_PROCESS_ADDRESSES_PATH']}"
        for name in _TPU_WORKERS:
            if name in env:
                return f"{name} = {env[name]}" if "," in env[name] else None
        # A TPU VM is told by its own metadata server, which answers at once; Colab and Kaggle have
        # none and say so.
        return None if "TPU_SKIP_MDS_QUERY" in env else "a TPU VM"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return f"JOB_COMPLETION_INDEX = {env['JOB_COMPLETION_INDEX']}"
    return None


def _arguments(told: Mapping[str, str]) -> dict[str, str | int]:
    """Arguments of `jax.distributed.initialize` from the variables of _TOLD.

    Raises:
      ConfigError: one is missing, or the numbers are none.
    """
    text = ", ".join(
        f"{name} = {told[name]!r}" if name in told else f"{name} is not set" for name in _TOLD
    )
    rule = f"{text}: all three are needed, with 0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES"
    remedy = "Set them on every host (the address is host:port of process 0), or none of them for one process."
    if not all(name in told for name in _TOLD):
        raise ConfigError(f"{rule}. {remedy}")
    address, num_processes, process_id = (told[name] for name in _TOLD)
    if not (
        num_processes.isdecimal()
        and process_id.isdecimal()
        and int(process_id) < int(num_processes)
        and ":" in address
    ):
        raise ConfigError(f"{rule}. {remedy}")
    return {
        "coordinator_address": address,
        "num_processes": int(num_processes),
        "process_id": int(process_id),
        "cluster_detection_method": "deactivate",
    }
