"""The mesh of devices."""

import dataclasses

from hunyuan_jax.config.section import Section, require


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """Sizes of the mesh axes. One of them may be -1: it takes all remaining devices."""

    section = "mesh"

    replica: int = 1
    """Copies of the model, over the slowest network: pure data parallelism."""
    data: int = -1
    """Devices that split the batch and the parameters (FSDP)."""
    context: int = 1
    """Devices that split the tokens of a sequence, and the parameters like `data`."""
    expert: int = 1
    """Devices that split the experts, and the batch outside the experts."""
    tensor: int = 1
    """Devices that split heads, MLP width and vocabulary."""
    num_slices: int = 1
    """TPU slices joined by the data centre's network (not an axis; `replica` spans them)."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        require(
            self.num_slices >= 1,
            f"config.mesh.num_slices = {self.num_slices} must be at least 1; 1 is a single slice, "
            "or no TPU.",
        )
        sizes = self.axis_sizes
        for name, size in sizes.items():
            require(
                size >= 1 or size == -1,
                f"config.mesh.{name} = {size} must be at least 1, or -1 for all remaining "
                "devices.",
            )
        remaining = [name for name, size in sizes.items() if size == -1]
        require(
            len(remaining) <= 1,
            f"config.mesh has -1 (all remaining devices) for {' and '.join(remaining)}; only one "
            "axis may take them.",
        )

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Axis name -> size."""
        sizes = dataclasses.asdict(self)
        del sizes["num_slices"]
        return sizes
