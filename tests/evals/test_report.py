"""The report page draws what `eval` has written."""

import json
import re

import pytest

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.report import page

EVALUATION = {
    "tasks": {
        "needle": {
            "samples": 2, "needles": 1, "seconds": 1.5, "failed": [], "mean": {"64": 75.0},
            "scores": {"64": {"0": 50.0, "100": 100.0}, "128": {"0": 25.0}},
        },
        "ruler": {
            "samples": 2, "seconds": 2.0, "failed": [], "mean": {"64": 60.0},
            "scores": {"vt": {"64": 20.0}, "niah_single_1": {"64": 100.0}},
            "by_depth": {"64": {"80-100": 90.0, "0-20": 10.0}},
        },
        "perplexity": {
            "seconds": 1.0, "bits_per_byte": 1.25, "failed": [],
            "by_position": [[1, 1, 3, 4.5], [2, 3, 6, 3.5]],
        },
        "choose": {"samples": {"choose": 4}, "scores": {"choose": {"acc,none": 0.75}},
                   "seconds": 1.0, "failed": []},
    }
}  # fmt: skip


def test_figures_of_an_evaluation(tmp_path):
    pytest.importorskip("plotly")
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    shown = page.write(tmp_path).read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', shown)[1]
    figures = json.loads(data)
    assert list(figures) == ["eval-needle", "eval-ruler", "eval-ruler-depth", "eval-perplexity"]
    (cells,) = figures["eval-needle"]["data"]
    assert (cells["x"], cells["y"]) == (["64", "128"], ["0", "100"])
    assert cells["z"] == [[50.0, 25.0], [100.0, None]]
    assert [curve["name"] for curve in figures["eval-ruler"]["data"]] == [
        "vt", "niah_single_1", "mean",
    ]  # fmt: skip
    assert figures["eval-ruler-depth"]["data"][0]["y"] == ["0-20", "80-100"]
    assert figures["eval-perplexity"]["data"][0]["y"] == [4.5, 3.5]
    assert "1.2500 bits per byte" in shown
    assert "<td>choose, acc</td><td>0.7500</td>" in shown


def test_a_folder_without_anything_says_what_to_pass(tmp_path):
    with pytest.raises(ConfigError, match="or the --output of `eval`"):
        page.write(tmp_path)
