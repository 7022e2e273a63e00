"""Commands keep compiled programs in the user's cache folder, or where JAX's variables say."""

import os
import subprocess
import sys

import pytest

from support.paths import ROOT

CODE = """
from hunyuan_jax import startup
print(startup.prepare())
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
"""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CACHE_HOME": "{tmp}/xdg"}, "{tmp}/xdg/hunyuan_jax/jax-"),
        (
            {"HOME": "{tmp}/home", "XDG_CACHE_HOME": "not/absolute"},
            "{tmp}/home/.cache/hunyuan_jax/",
        ),
        ({"JAX_COMPILATION_CACHE_DIR": "{tmp}/mine"}, "{tmp}/mine"),
        ({"XDG_CACHE_HOME": "{tmp}/xdg", "JAX_ENABLE_COMPILATION_CACHE": "false"}, ""),
    ],
)
def test_where_programs_are_kept(tmp_path, variables, expected):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XDG"))
    }
    environment |= {name: value.format(tmp=tmp_path) for name, value in variables.items()}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    folder = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()
    assert folder.startswith(expected.format(tmp=tmp_path))
    kept = [path.name for path in tmp_path.rglob("jit*") if path.is_file()]
    assert any("lambda" in name for name in kept) == bool(expected)
    assert not expected or any(name.startswith("jit") for name in os.listdir(folder))
