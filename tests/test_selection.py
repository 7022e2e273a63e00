"""`pytest --fast` runs the first case of every test but the heavy ones."""

import subprocess
import sys

import pytest

from support import paths


def collected(*arguments):
    command = [sys.executable, "-m", "pytest", "-n", "0", "--collect-only", "-q"]
    command += ["-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=True)
    return [line for line in result.stdout.splitlines() if "::" in line]


@pytest.mark.heavy
def test_fast_keeps_the_first_case_of_each_test_that_is_not_heavy():
    files = ("tests/train/test_failures.py", "tests/config/test_config.py")
    everything, fast = collected(*files), collected("--fast", *files)
    first = dict.fromkeys(name.split("[")[0] for name in everything)
    heavy = [name for name in first if "test_killed_in_a_save" in name]
    assert len(heavy) == 1 and len(first) < len(everything)
    assert [name.split("[")[0] for name in fast] == [name for name in first if name not in heavy]
