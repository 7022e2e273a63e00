"""The progress bar: live on a terminal, lines of text elsewhere."""

import re

import pytest

from hunyuan_jax.progress import Meter, ProgressBar, in_order


@pytest.mark.parametrize("width", [80, 60])
def test_the_live_line_fits_the_terminal(width, monkeypatch, capsys):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": str(width)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    bar = ProgressBar("step", 100_000)
    bar.update(99_999, "loss 1.2345  1,234,567 tokens/s", 3.0)
    bar.close()
    shown = [
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        for text in re.split(r"[\r\n]+", capsys.readouterr().err)
    ]
    assert max(map(len, shown)) <= width
    assert "step 99999/100000" in shown[-2] and "loss 1.2345  1,234,567 tokens/s" in shown[-2]


def test_lines_are_plain_where_there_is_no_terminal(capsys):
    with ProgressBar("step", 10, seconds_per_line=0) as bar:
        bar.update(5, "loss 1.2345", 75.0)
    assert capsys.readouterr().err == "step 5/10  loss 1.2345  1:15 left\n"


def test_few_lines_are_shown_but_always_the_last(capsys):
    with Meter("import", 3_000_000) as meter:
        for _ in range(3):
            meter.add(1_000_000)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"import 0\.003/0\.003 GB  [\d.]+ GB/s  0:00 left", line)


def test_a_hidden_bar_shows_nothing(capsys):
    with ProgressBar("step", 10, seconds_per_line=0, is_shown=False) as bar:
        bar.update(10, "done")
        bar.print("a line")
    assert capsys.readouterr().err == ""


def test_results_come_in_order():
    assert list(in_order(lambda x: x * x, range(5))) == [(x, x * x) for x in range(5)]
