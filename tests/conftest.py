"""Every test sees eight CPU devices and strict dtype promotion."""

import os

# Before jax is imported: the sharding tests need devices, and a TPU or GPU of the machine must not be used by accident.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
