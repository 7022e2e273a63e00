"""What a command does first, so that it starts sooner: compiled programs are kept from one process
to the next, and garbage is collected less often.
"""

import atexit
import gc
import hashlib
import os
import platform
from pathlib import Path

# Importing and tracing make many objects that stay.  At Python's 700 a fifth of the time from the
# start to the first token went to looking for garbage among them.
_ALLOCATIONS_PER_COLLECTION = 100_000
# Programs that compile in less are not kept.
_LEAST_SECONDS = 0.2


def prepare() -> str:
    """Turns on jax's persistent cache, and returns the folder that it is in.

    That is JAX_COMPILATION_CACHE_DIR if it is set, else one of the user's cache folder
    (XDG_CACHE_HOME, by default ~/.cache) for this version of jax and this kind of CPU: a program
    that was compiled for another CPU may end the process.  JAX_ENABLE_COMPILATION_CACHE=false
    keeps nothing; the folder is then "".

    Call it before jax compiles anything.
    """
    import jax

    gc.set_threshold(_ALLOCATIONS_PER_COLLECTION)
    atexit.register(gc.freeze)  # or the interpreter, as it ends, looks for garbage once more
    if not jax.config.jax_enable_compilation_cache:
        return ""
    if not jax.config.jax_compilation_cache_dir:
        folder = _cache_home() / "hunyuan_jax" / f"jax-{jax.__version__}-{_cpu_kind()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    return jax.config.jax_compilation_cache_dir


def _cache_home() -> Path:
    stated = os.environ.get("XDG_CACHE_HOME", "")  # relative paths are invalid by its rules
    return Path(stated) if os.path.isabs(stated) else Path.home() / ".cache"


def _cpu_kind() -> str:
    """A short name of the instructions that this CPU has."""
    kind = " ".join([platform.machine(), *cpu_flags()])
    return hashlib.sha256(kind.encode()).hexdigest()[:8]


def cpu_flags() -> list[str]:
    """The instruction sets of this CPU by Linux's names, such as "avx2"; none on other systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return flags.partition(":")[2].split()
