"""What parameters are for.  Imports no jax."""

import enum


class Role(enum.StrEnum):
    """What a parameter is for."""

    MATRIX = enum.auto()  # a projection that every token meets; an untied head is one
    EXPERT = enum.auto()  # a projection of the routed experts
    EMBEDDING = enum.auto()  # the table that tokens are looked up in
    NORM = enum.auto()  # a scale
    BIAS = enum.auto()
    ROUTER = enum.auto()  # the matrix that chooses experts
    BALANCE = enum.auto()  # a bias on the choice of experts, moved by their load
    ADAPTER = enum.auto()  # one of the two matrices of a LoRA adapter


# Used in the model's dtype, and quantisable.  The others stay float32: they are few, and the
# router decides between near-equal numbers.
LOW_PRECISION_ROLES = (Role.MATRIX, Role.EXPERT, Role.EMBEDDING, Role.ADAPTER)

# Float32 in every folder and checkpoint, whatever the dtype of the model.
KEPT_ROLES = (Role.ROUTER, Role.BALANCE)
