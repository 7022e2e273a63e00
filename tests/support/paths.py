"""Paths of the test data."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
# Given to developers and CI, not part of a clone: tests that read it are skipped without it.
SHARED = ROOT.parent / "shared"
