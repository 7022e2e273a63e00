"""benchmarks/gpu_day.py on a CPU: a section that fails costs its own rows only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
# A stand-in with sections that fail in every way; it is also what their processes run.
FAKE = """
import os, sys, time
sys.path.insert(0, "benchmarks")
import gpu_day

def good(is_dry):
    yield {"case": "first", "ms": 1.5}
    yield {"case": "second", "is_ok": CHECK}

def raises(is_dry):
    yield {"case": "before"}
    raise ValueError("a reason")

def crashes(is_dry):
    yield {"case": "before"}
    os.abort()

def hangs(is_dry):
    yield {"case": "before"}
    time.sleep(600)

gpu_day.SECTIONS = {
    fn.__name__: gpu_day.Section(fn, 5 if fn is hangs else 60) for fn in FUNCTIONS
}
gpu_day.__file__ = __file__
if __name__ == "__main__":
    sys.exit(gpu_day.main())
"""


def run(script, *flags):
    return subprocess.run(
        [sys.executable, str(script), *flags],
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def fake(tmp_path, functions, check=True):
    script = tmp_path / "fake.py"
    script.write_text(FAKE.replace("FUNCTIONS", functions).replace("CHECK", str(check)))
    return script


@pytest.mark.heavy
def test_a_section_that_fails_costs_its_own_rows_only(tmp_path):
    script = fake(tmp_path, "(raises, crashes, hangs, good)")
    result = run(script, f"--out={tmp_path}")
    assert result.returncode == 1
    written = json.loads((tmp_path / "gpu_day.json").read_text())
    ends = {row["section"]: row["end"] for row in written["sections"]}
    assert ends == {
        "raises": "ended with 1",
        "crashes": "ended with -6",
        "hangs": "stopped after 5 s",
        "good": "ok",
    }
    assert [(row["section"], row["case"]) for row in written["rows"]] == [
        ("raises", "before"),
        ("crashes", "before"),
        ("hangs", "before"),
        ("good", "first"),
        ("good", "second"),
    ]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == written["rows"]
    assert "first   1.500" in result.stdout


@pytest.mark.heavy
def test_a_check_that_fails_is_the_exit_status(tmp_path):
    for check in (True, False):
        script = fake(tmp_path, "(good,)", check)
        assert run(script, f"--out={tmp_path}").returncode == (not check)


@pytest.mark.heavy
def test_what_the_budget_has_no_time_for_is_skipped(tmp_path):
    script = fake(tmp_path, "(good, raises)")
    assert run(script, f"--out={tmp_path}", "--budget=1").returncode == 1
    written = json.loads((tmp_path / "gpu_day.json").read_text())
    assert [row["end"] for row in written["sections"]] == ["skipped: no time left"] * 2
    assert written["rows"] == []


def test_sections_are_chosen_by_a_word_and_run_dry_on_a_cpu(tmp_path):
    script = REPO / "benchmarks" / "gpu_day.py"
    result = run(script, f"--out={tmp_path}", "--only=device", "--dry_run")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "gpu_day.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["device", "product 256^3", "copy"]
