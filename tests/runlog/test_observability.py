"""What a run says about itself: where the time goes, health of the mixtures, validation figures,
traces, the live line, the report.
"""

import dataclasses
import functools
import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers.ffn.moe import layer as moe
from hunyuan_jax.report import page as report
from hunyuan_jax.runlog import goodput, metrics
from hunyuan_jax.train import loop
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.state import build_program
from pallas_kernels import tpu_compiler
from support.models import COMPILER_OPTIONS, fast_jit, mesh_of
from support.runs import config_for as run_config
from support.runs import on_one_device, rows, write_corpus
from support.steps import MODEL, batch, config_for, initial_params


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with on_one_device():
        yield


# Goodput


class Clock:
    def __init__(self):
        self.now, self.wall_shift = 100.0, 1e9

    def goodput(self):
        return goodput.Goodput(lambda: self.now, lambda: self.now + self.wall_shift)


def one_process(clock, workdir, first_step, rows, end=None):
    """2 s of startup, then `rows` of (cause, seconds, steps done)."""
    watch = clock.goodput()
    clock.now += 2
    watch.start(workdir, first_step)
    for cause, seconds, step in rows:
        with watch.time(cause):
            clock.now += seconds
        watch.flush(step)
    if end:
        watch.end(rows[-1][2], end)
    watch.close()
    return watch.ledger


def test_time_has_a_cause_each_and_steps_lost_by_a_crash_are_not_productive(tmp_path):
    clock = Clock()
    one_process(
        clock,
        tmp_path,
        0,
        [("compile", 5, 0), ("productive", 10, 10), ("checkpoint", 1, 10), ("productive", 8, 20)],
    )
    clock.now += 30  # dead, after a checkpoint at step 15: half of the last row is lost
    ledger = one_process(clock, tmp_path, 15, [("productive", 4, 20)], "finished")
    expected = {
        "startup": 4,
        "compile": 5,
        "productive": 10 + 4 + 4,
        "checkpoint": 1,
        "repeated": 4,
        "down": 30,
    }
    assert {
        cause: seconds for cause, seconds in ledger.seconds.items() if seconds
    } == pytest.approx(expected)
    assert ledger.goodput == pytest.approx(18 / 62)
    assert ledger.num_starts == 2
    assert goodput.Ledger(goodput.read_rows(tmp_path / goodput.FILE)).seconds == pytest.approx(
        ledger.seconds
    )
    clock.now += 1000  # nobody wanted it to run
    assert one_process(clock, tmp_path, 20, [("productive", 4, 30)]).seconds[
        "down"
    ] == pytest.approx(30)


def test_time_of_skipped_steps_is_not_productive(tmp_path):
    clock = Clock()
    watch = clock.goodput()
    watch.start(tmp_path, 0)
    watch.switch("productive")
    clock.now += 10
    watch.flush(10, skipped=0.3)
    watch.close()
    expected = {"productive": 7, "skipped": 3}
    assert {
        cause: seconds for cause, seconds in watch.ledger.seconds.items() if seconds
    } == pytest.approx(expected)
    assert goodput.Ledger(goodput.read_rows(tmp_path / goodput.FILE)).goodput == pytest.approx(0.7)


def test_nested_causes_share_the_time():
    clock = Clock()
    watch = clock.goodput()
    watch.start(None, 0)
    with watch.time("evaluation"):
        clock.now += 3
        with watch.time("compile"):
            clock.now += 2
        clock.now += 1
    assert (watch.spent("evaluation"), watch.spent("compile")) == (4, 2)


@pytest.mark.parametrize("shift", [-1e6, 1e6])
def test_a_change_of_the_wall_clock_makes_nothing_negative(tmp_path, shift):
    clock = Clock()
    watch = clock.goodput()
    watch.start(tmp_path, 0)
    clock.wall_shift += shift  # inside a process: not noticed
    watch.switch("productive")
    clock.now += 5
    watch.flush(5)
    watch.close()
    assert watch.ledger.total == 5
    ledger = one_process(clock, tmp_path, 5, [("productive", 5, 10)])
    assert min(ledger.seconds.values()) >= 0 and ledger.seconds["productive"] == 10
    assert ledger.seconds["down"] == pytest.approx(max(0.0, shift))


def test_a_ledger_cut_off_by_a_crash_goes_on(tmp_path):
    clock = Clock()
    one_process(clock, tmp_path, 0, [("productive", 10, 10)])
    with (tmp_path / goodput.FILE).open("a") as file:
        file.write('{"time": 1, "st')
    ledger = one_process(clock, tmp_path, 10, [("productive", 10, 20)])
    assert ledger.seconds["productive"] == 20
    assert goodput.Ledger(goodput.read_rows(tmp_path / goodput.FILE)).seconds == pytest.approx(
        ledger.seconds
    )


# Health of the mixtures

DROP = dataclasses.replace(
    MODEL, moe=dataclasses.replace(MODEL.moe, dispatch="drop", capacity_factor=0.7)
)


def health(sizes=(1, 1, 1), parts=1, model=DROP):
    program = build_program(config_for(model, grad_accum_steps=parts), mesh_of(*sizes))
    params = jax.device_put(initial_params(), program.shardings.params)
    placed = step_lib.place_batch(program, batch())
    fn = fast_jit(lambda *a: moe.router_metrics(step_lib.gradients(program, *a)[2].router))
    return jax.tree.map(np.asarray, fn(params, placed, jax.random.key(3)))


@functools.cache
def health_alone():
    """(figures, recorded router logits and assignment of each layer) on one device."""
    recorded = []

    def serve(weights, x_gTD, assignment, original=moe.serve, **how):
        jax.debug.callback(
            lambda *a: recorded.append(jax.tree.map(np.asarray, a)), *assignment, ordered=False
        )
        return original(weights, x_gTD, assignment, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "serve", serve)
        figures = health()
    jax.effects_barrier()
    return figures, recorded


def test_figures_are_those_of_the_recorded_assignments():
    figures, recorded = health_alone()
    is_valid = batch()["segment_ids"] > 0
    L, E = figures["load_LE"].shape
    assert len(recorded) == L and not is_valid.all()
    loads, dropped = [], []
    for expert, _, _, is_kept, *_ in recorded:
        served = expert[is_kept & is_valid[..., None]]
        loads.append(np.bincount(served, minlength=E) / served.size)
        dropped.append(1 - served.size / is_valid.sum())
        assert 0 < dropped[-1] < 1
    by_load = (
        np.lexsort(np.round(loads, 6).T),
        np.lexsort(np.round(figures["load_LE"], 6).T),
    )  # callbacks come in any order
    np.testing.assert_allclose(
        figures["load_LE"][by_load[1]], np.array(loads)[by_load[0]], atol=1e-6
    )
    np.testing.assert_allclose(np.sort(figures["dropped_L"]), np.sort(dropped), atol=1e-6)
    wished = [
        np.bincount(expert[is_valid].ravel(), minlength=E) / is_valid.sum()
        for expert, *_ in recorded
    ]  # "drop" moves nobody
    by_wish = np.lexsort(np.round(wished, 6).T), np.lexsort(np.round(figures["demand_LE"], 6).T)
    np.testing.assert_allclose(
        figures["demand_LE"][by_wish[1]], np.array(wished)[by_wish[0]], atol=1e-6
    )


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("sizes", "parts", "remat"),
    [
        ((1, 1, 1), 2, "none"),
        ((1, 1, 1), 4, "full"),
        ((1, 1, 1), 1, "dots"),
        ((2, 2, 2), 2, "none"),
    ],
)
@pytest.mark.heavy
def test_figures_are_the_same_in_parts_on_meshes_and_under_remat(sizes, parts, remat):
    figures = health(sizes, parts, dataclasses.replace(DROP, remat=remat))
    for name, value in health_alone()[0].items():
        np.testing.assert_allclose(figures[name], value, atol=1e-5, err_msg=name)


def test_a_dead_expert_is_one_that_the_router_hardly_names():
    demand_LE = np.array([[0.5, 0.4976, 0.0024], [0.5, 0.4966, 0.0034]])
    even_LE = np.full((2, 3), 1 / 3)
    figures = {
        "recycled_L": np.zeros(2),
        "dropped_L": np.zeros(2),
        "entropy_L": np.ones(2),
        "aux_loss": 1.0,
        "z_loss": 0.0,
    }
    row = metrics.moe_health({"demand_LE": demand_LE, "load_LE": even_LE, **figures})
    assert row["moe/dead_experts"] == 1  # 1 % of a third is 0.0033
    assert row["moe/demand_max_over_mean"] == pytest.approx(1.5) and row[
        "moe/load_max_over_mean"
    ] == pytest.approx(1.0)
    assert row["moe/demand"] == demand_LE.tolist()


# A run


@pytest.mark.parametrize("steps", ["10", "3:2", "0:4", "a:b", "1:", "1:2:3"])
def test_profile_steps_are_checked(steps):
    with pytest.raises(
        ConfigError,
        match=rf"config\.train\.profile_steps = '{steps}' must be FIRST:LAST, such as 10:13",
    ):
        config_for(profile_steps=steps)


@pytest.mark.heavy
def test_a_run_with_a_trace_and_its_report(corpus, tmp_path):
    config = run_config(corpus, profile_steps="2:3")
    assert loop.run(config, tmp_path) == 0
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert traced_steps(trace) == {2, 3}
    found = [row for row in rows(tmp_path) if "validation_loss" in row][-1]
    assert found["validation_perplexity"] == pytest.approx(np.exp(found["validation_loss"]))
    # Targets are bytes, and some of them an eos, which is no text.
    assert 1 < found["validation_bits_per_byte"] * np.log(2) / found["validation_loss"] < 1.01
    last = [row for row in rows(tmp_path) if "loss" in row][-1]
    assert 0 < last["goodput"] < 1
    spent = {
        name: last[f"goodput/{name}_seconds"]
        for name in ("productive", "startup", "compile", "evaluation", "checkpoint", "profile")
    }
    assert min(spent.values()) > 0
    assert (
        max(row["seconds_per_step"] for row in rows(tmp_path) if "loss" in row) < spent["compile"]
    )  # compiling is not a step
    ledger = goodput.Ledger(goodput.read_rows(tmp_path / goodput.FILE))
    assert ledger.seconds["down"] == 0 and ledger.num_starts == 1
    assert json.loads((tmp_path / "environment.json").read_text())["jax"] == jax.__version__
    text = report.write(tmp_path).read_text()
    assert (
        "validation" in text
        and f"<td>train.batch_size</td><td>{config.train.batch_size}</td>" in text
    )


def traced_steps(path):
    """From the JSON that lies beside the trace: jax.profiler.ProfileData aborts the process on jax
    0.12.
    """
    (beside,) = path.parent.glob("*.trace.json.gz")
    events = json.loads(gzip.decompress(beside.read_bytes()))["traceEvents"]
    return {int(event["args"]["step_num"]) for event in events if event.get("name") == "train"}


def test_wandb_is_asked_for_by_name_and_missing_with_a_message(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    metrics.require_wandb("")
    with pytest.raises(
        ConfigError,
        match=r"config\.train\.wandb_project = 'moe' needs Weights & Biases, .* pip install wandb",
    ):
        loop.Log(config_for(wandb_project="moe"), "unused")


WANDB = """
import sys, types
from hunyuan_jax import presets
from hunyuan_jax.config import Config, TrainConfig
from hunyuan_jax.runlog.metrics import MetricsWriter
config = Config(model=presets.tiny(), train=TrainConfig(wandb_project="moe"))
for step in (1, 2):
    writer = MetricsWriter(sys.argv[1], step - 1, config)
    writer.write(step, {"loss": 2.5, "moe/load": [[0.5, 0.5]]})
    writer.close()
"""


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", WANDB, str(tmp_path)], env=env, check=True, timeout=120)
    ids = {
        path.name.rsplit("-", 1)[1].removesuffix(".wandb") for path in tmp_path.rglob("*.wandb")
    }
    assert ids == {(tmp_path / "wandb_id").read_text()}  # one run over both processes


# The report

ATTACK = (
    "</script><script>document.title='owned'</script><img src=x "
    "onerror=\"document.title='owned'\">"
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run in progress with a hostile config, damaged rows and numbers that are none."""
    folder = tmp_path_factory.mktemp("report") / "a <b> run"
    folder.mkdir()
    lines = ["not json", '{"step": "x", "loss": 1}', "[1]", '{"loss": 3}', "\x00"]
    for step in range(1, 4001):
        row = {
            "step": step,
            "loss": 6 / step**0.2,
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
            "tokens_per_second": 1e4,
            "goodput": 0.9,
        }
        demand = (np.random.default_rng(step).dirichlet(np.ones(4), 2)).round(5).tolist()
        lines.append(
            json.dumps(
                {
                    **row,
                    "moe/demand": demand,
                    "moe/load": [[0.25] * 4] * 2,
                    "moe/recycled": 0.1,
                    "moe/dropped": 0.0,
                }
            )
        )
    lines += [
        '{"step": 4001, "loss": NaN, "moe/demand": "x"}',
        '{"step": 4001, "validation_loss": 1.5}',
        '{"step": 4002, "lo',
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "config.json").write_text(
        json.dumps({"data": {"source": ATTACK}, "train": {"num_steps": 9000}})
    )
    clock = Clock()
    one_process(clock, folder, 0, [("productive", 10, 10), ("compile", 4, 10)])
    one_process(clock, folder, 0, [("productive", 10, 10)])
    return folder


def test_the_page_of_a_damaged_run_is_escaped_and_thinned(workdir):
    path = report.write(workdir)
    text = path.read_text()
    assert path == workdir / "report.html"
    assert "<img src=x" not in text and "&lt;img src=x" in text and "a &lt;b&gt; run" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert len(data["loss"]["data"][0]["x"]) <= 1202
    assert len(data["experts"]["data"][0]["x"]) == 160
    assert ">9,000<" not in text and "of 9,000" in text and "4,001" in text
    assert "Restarts</span><b>1</b>" in text


def test_a_spike_survives_thinning():
    values = [1.0] * 100_000
    values[54_321] = 9.0
    steps, thinned = report._thinned(list(range(len(values))), values)
    assert len(steps) <= 1202 and steps[thinned.index(9.0)] == 54_321


def test_what_the_report_refuses(tmp_path, workdir, monkeypatch):
    with pytest.raises(ConfigError, match="holds no metrics"):
        report.write(tmp_path)
    with pytest.raises(ConfigError, match="the folder .* does not exist"):
        report.write(workdir, tmp_path / "none" / "r.html")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs plotly.*\[report\]"):
        report.write(workdir)


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine: the page was not opened in a browser"
)
@pytest.mark.heavy
def test_a_browser_draws_everything_and_runs_nothing_else(workdir, tmp_path):
    path = report.write(workdir, tmp_path / "page.html")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking "
        "--disable-component-update --disable-sync --no-first-run"
    )
    command = [
        CHROMIUM,
        *options.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=10000",
        "--dump-dom",
        path.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    num_figures = len(
        json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.S)[1])
    )
    assert f'data-drawn="{num_figures}"' in dom
    assert dom.count("main-svg") >= num_figures >= 8
    assert "<title>a &lt;b&gt; run</title>" in dom  # the config's script did not run


@pytest.fixture(autouse=True)
def quick_compilation(monkeypatch):
    monkeypatch.setattr(tpu_compiler, "train_step_options", lambda kind: COMPILER_OPTIONS)
