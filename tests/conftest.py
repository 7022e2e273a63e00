"""Every test sees eight CPU devices and strict dtype promotion; a program compiled once is shared
by all tests of a run.
"""

import os
import tempfile

# Before jax is imported: the sharding tests need devices, and a TPU or GPU of the machine must not
# be used by accident.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)

# Workers of pytest-xdist inherit the folder from the process that starts them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="hunyuan_jax_tests_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """Ends the run, after pytest's own summary, with what could not be checked on this machine."""
    yield
    reasons = {
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", ())
    }
    for reason in sorted(reason for reason in reasons if reason.startswith("NOT CHECKED: ")):
        terminalreporter.write_line(f"WARNING: {reason}", yellow=True, bold=True)
