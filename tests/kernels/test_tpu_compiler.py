"""Programs for devices that are not there stay out of jax's persistent cache."""

import jax
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from pallas_kernels import tpu_compiler


def test_programs_are_kept_but_in_without_cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    reset_cache()
    try:
        x = np.ones((4, 4), np.float32)
        with tpu_compiler.without_cache():
            jax.jit(lambda x: x @ x + 1).lower(x).compile()
        assert not list(tmp_path.iterdir())
        jax.jit(lambda x: x @ x + 2).lower(x).compile()
        assert list(tmp_path.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        reset_cache()
