"""Freed memory goes back to the system; commands that compute on a CPU ask for huge pages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hunyuan_jax import malloc


def resident_mb():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_given_back():
    blocks = [
        bytes(1000) for _ in range(100_000)
    ]  # larger than what Python manages itself, smaller than what malloc maps
    last = bytes(1000)  # so the end of the heap is in use
    before = resident_mb()
    del blocks
    malloc.trim()
    assert resident_mb() < before - 60
    del last


@pytest.mark.parametrize(
    ("platforms", "tunables", "expected"),
    [
        ("cpu", "", "glibc.malloc.hugetlb=1"),
        ("cpu", "glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ("cpu", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("tpu", "", ""),
    ],
)
def test_restarts_once_with_huge_pages(platforms, tunables, expected):
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("a program has no say in huge pages here")
    program = (
        "import os, sys; from hunyuan_jax import malloc; print('started', flush=True); "
        "malloc.restart_with_huge_pages(); print(os.environ['GLIBC_TUNABLES'], sys.argv[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "--flag=1"],
        env={**os.environ, "JAX_PLATFORMS": platforms, "GLIBC_TUNABLES": tunables},
        capture_output=True,
        text=True,
        check=True,
    )
    num_starts = 1 if expected == tunables else 2
    assert result.stdout == "started\n" * num_starts + f"{expected} --flag=1\n"
