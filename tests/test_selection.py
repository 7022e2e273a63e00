"""Which cases `pytest`, `pytest --fast` and `pytest --every-case` run."""

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
    file = "tests/test_cli.py"
    everything, fast = collected(file), collected("--fast", file)
    first = dict.fromkeys(name.split("[")[0] for name in everything)
    heavy = {
        f"{file}::test_{name}"
        for name in (
            "count_prints_the_exact_numbers",
            "train_then_generate",
            "a_platform_that_is_not_there_is_one_line",
        )
    }
    assert heavy < first.keys() and len(first) < len(everything)
    assert [name.split("[")[0] for name in fast] == [name for name in first if name not in heavy]


@pytest.mark.heavy
def test_some_cases_are_spread_over_all_and_every_case_or_a_named_one_is_run():
    # 18 cases in the file, of which it marks 7 to be run.
    name = "test_each_token_comes_back_from_its_experts_with_its_weight"
    file = "tests/layers/test_moe.py"
    some, every = (
        [case for case in collected(*options, file) if name in case]
        for options in ((), ("--every-case",))
    )
    assert (len(some), len(every)) == (7, 18)
    assert [every.index(case) for case in some] == [0, 3, 6, 8, 11, 14, 17]
    assert every[1] not in some and collected(every[1]) == [every[1]]
