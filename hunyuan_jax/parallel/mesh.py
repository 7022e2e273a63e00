"""Joins the processes of a run, and builds the mesh of five named axes over their devices."""

import math
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from hunyuan_jax.config import MeshConfig
from hunyuan_jax.errors import ConfigError

AXES = ("replica", "data", "context", "expert", "tensor")
# Indices of AXES by rising traffic: mesh_utils gives later axes the contiguous parts of the torus.
# Weights and gradients go over `data` and `context`, 285 GiB a step of a52b on v5p:4x8x8; tokens
# over `expert`, 20 GiB.
_BY_TRAFFIC = (0, 3, 1, 2, 4)

# Launchers pass these as environment variables, which are read nowhere else.  Of the first three
# jax 0.10 to 0.12 reads only the address.
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_TPU_WORKERS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


def join_processes() -> None:
    """Calls `jax.distributed.initialize` if this process is one of several.

    Call it before the first use of a device.  JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, set on every host, always work.  Without them jax detects
    TPU pods (TPU VMs and GKE), slurm, Open MPI and indexed Kubernetes jobs.  The environment and
    the PCI bus decide whether there is anything to detect, so nothing waits for a network on a
    machine without TPUs.

    Raises:
      ConfigError: the three variables are incomplete or wrong, or other processes cannot be
        reached.
    """
    if jax.distributed.is_initialized():
        return
    told = {name: os.environ[name] for name in _EXPLICIT if name in os.environ}
    # These two come before what jax would detect; the address alone does not.
    is_explicit = "JAX_NUM_PROCESSES" in told or "JAX_PROCESS_ID" in told
    reason = None if is_explicit else _launcher(os.environ, has_tpu=_has_tpu())
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
            f"them failed: {e} Start the same command on every host, or set "
            f"{', '.join(_EXPLICIT)} (JAX_NUM_PROCESSES=1 for a run of one process)."
        ) from e


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of `cfg` over `devices` (all of them if None); an axis of -1 fills it up.

    On TPUs the axes are laid along the torus, those with more traffic first; an axis that is not a
    product of the torus' dims takes parts of them.  `replica` spans the slices.  Elsewhere the
    devices are taken in their order.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, the number of slices is not
        that of the devices, or the torus has no such mesh.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_sizes(cfg, len(devices))
    is_tpu = devices[0].platform == "tpu"
    # A host of GPUs calls itself a slice, which says nothing about its network.
    if is_tpu or cfg.num_slices > 1:
        _check_slices(cfg, sizes, devices)
        array = _torus_mesh(cfg, sizes, devices)
    else:
        array = np.asarray(devices).reshape(sizes)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def single_device_mesh() -> Mesh:
    """Returns a mesh with axes of size one on this process's first device, as notebooks use."""
    return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])


def first_device(mesh: Mesh | AbstractMesh) -> jax.Device | None:
    """Returns a device of a mesh, None for an abstract mesh.

    Kernels and compiler options are chosen by it: the process's own backend is wrong when a CPU
    plans a pod.
    """
    return mesh.devices.flat[0] if isinstance(mesh, Mesh) else None


def device_kind(mesh: Mesh | AbstractMesh) -> str:
    """Returns jax's name of a mesh's devices, such as "TPU v5"; "" for an abstract mesh."""
    device = first_device(mesh)
    return device.device_kind if device else ""


def resolve_sizes(cfg: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Returns the axis sizes in the order of AXES, with -1 replaced.

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
            "the sizes must multiply to that number. Set one axis to -1 to let it take the rest."
        )
    return resolved


def _check_slices(cfg: MeshConfig, sizes: tuple[int, ...], devices: list[jax.Device]) -> None:
    # Devices of a single slice may have no slice_index.
    found = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if found != cfg.num_slices:
        raise ConfigError(
            f"config.mesh.num_slices = {cfg.num_slices}, but the {len(devices)} devices form "
            f"{found} slice(s); the two must be equal. Set config.mesh.num_slices to {found} and "
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
    """Returns the devices as [replica, data, context, expert, tensor], laid along the torus."""
    between = (cfg.num_slices, 1, 1, 1, 1)
    inside = tuple(size // num for size, num in zip(sizes, between, strict=True))
    try:
        # Split dims are needed: 16 experts on v5p:4x8x8 are not a product of 4, 8 and 8.
        options = {"allow_split_physical_axes": True}
        if cfg.num_slices > 1:
            array = mesh_utils.create_hybrid_device_mesh(
                _by_traffic(inside), _by_traffic(between), devices, **options
            )
        else:
            array = mesh_utils.create_device_mesh(_by_traffic(inside), devices, **options)
        return array.transpose(np.argsort(_BY_TRAFFIC))
    # What mesh_utils raises for holes, cores, unequal slices and primes.
    except (AssertionError, NotImplementedError, TypeError, ValueError) as e:
        text = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"config.mesh = {text} cannot be laid out on these {len(devices)} devices "
            f"({devices[0].device_kind}): {str(e)[:300]} "
            "The devices must fill a box of the torus, and each axis takes factors of its sides; "
            "use sizes that are products of those, such as powers of two."
        ) from e


def _by_traffic(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sizes[axis] for axis in _BY_TRAFFIC)


def _has_tpu() -> bool:
    """Whether jax takes this machine for a TPU VM.

    That needs libtpu, chips on the PCI bus, and a JAX_PLATFORMS that allows them.
    """
    # Private, but it is what jax's own cluster detection reads.
    from jax._src import cloud_tpu_init

    platforms = jax.config.jax_platforms
    return cloud_tpu_init.running_in_cloud_tpu_vm and (not platforms or "tpu" in platforms)


def _launcher(env: Mapping[str, str], has_tpu: bool) -> str | None:
    """Returns the variable by which jax finds several processes, or None for a single one."""
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
        # A TPU VM asks its metadata server, which answers at once.  Colab and Kaggle have none and
        # set this variable.
        return None if "TPU_SKIP_MDS_QUERY" in env else "a TPU VM"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return f"JOB_COMPLETION_INDEX = {env['JOB_COMPLETION_INDEX']}"
    return None


def _arguments(told: Mapping[str, str]) -> dict[str, str | int]:
    """Returns the arguments of `jax.distributed.initialize` from the variables of _EXPLICIT.

    Raises:
      ConfigError: a variable is missing or not a number in range.
    """
    text = ", ".join(
        f"{name} = {told[name]!r}" if name in told else f"{name} is not set" for name in _EXPLICIT
    )
    rule = f"{text}: all three are needed, with 0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES"
    remedy = (
        "Set them on every host (the address is host:port of process 0), or none of them for one "
        "process."
    )
    if not all(name in told for name in _EXPLICIT):
        raise ConfigError(f"{rule}. {remedy}")
    address, num_processes, process_id = (told[name] for name in _EXPLICIT)
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
