"""Every test sees eight CPU devices and strict dtype promotion; a program compiled once is shared
by all workers of a run, and by the runs that follow.
"""

import collections
import gc
import os
import re
import shutil
import sys
import tempfile

import hypothesis
import jax
import pytest

# Before jax starts its backends: the sharding tests need devices, and a TPU or GPU of the machine
# must not be used by accident.
os.environ["JAX_PLATFORMS"] = "cpu"
jax.config.update("jax_platforms", "cpu")
# Compiling is what the tests spend their time on.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    # A program's code is not split among threads: every core has a worker of pytest already.
    "--xla_cpu_parallel_codegen_split_count=1",
    # A collective whose devices do not meet within this ends the process; the default of 40 s is
    # short for eight devices on a machine that does other work.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
]
if jax.version.__version_info__ < (0, 11):
    # The older emitters compile two to three times faster; jax 0.12 no longer has them.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()

jax.config.update("jax_numpy_dtype_promotion", "strict")
# pytest keeps the rewritten asserts of the tests as byte code, also where other programs are told
# to keep none: each worker of each run would rewrite them for ten seconds.
sys.dont_write_bytecode = False
pytest.register_assert_rewrite("support")
# Examples are drawn slowly beside other work.
SLOWLY = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=SLOWLY)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser):
    parser.addoption(
        "--fast",
        action="store_true",
        help="for daily work: the first case of each test, without those marked `heavy`",
    )
    parser.addoption(
        "--every-case",
        action="store_true",
        help="all cases of the tests marked `cases(n)`, of which n are run otherwise",
    )


def pytest_configure(config):
    # Workers of pytest-xdist, and the processes that tests start, inherit the folder.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = programs_folder(config)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        jax.config.update("jax_compilation_cache_dir", folder)


def programs_folder(config):
    """Where compiled programs are kept: in pytest's cache, so that the next run has them too."""
    if hasattr(config, "cache"):
        return str(config.cache.mkdir(f"jax-{jax.__version__}"))
    folder = tempfile.mkdtemp(prefix="hunyuan_jax_tests_")  # `-p no:cacheprovider`
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    return folder


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leaves out what --fast and `cases` leave out; a case that is named is run."""
    if any("[" in argument for argument in config.args):
        return
    by_test = {}
    for item in items:
        by_test.setdefault(item.nodeid.split("[")[0], []).append(item)
    kept = {item for cases in by_test.values() for item in chosen(config, cases)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def chosen(config, cases):
    """The cases of a test that are run."""
    if config.getoption("--fast"):
        return [case for case in cases[:1] if case.get_closest_marker("heavy") is None]
    mark = cases[0].get_closest_marker("cases")
    if mark is None or config.getoption("--every-case"):
        return cases
    # Spread over all of them, the first and the last included.
    num, last = mark.args[0], len(cases) - 1
    places = {round(i * last / max(1, num - 1)) for i in range(num)}
    return [cases[place] for place in sorted(places)]


def pytest_collection_finish(session):
    # Tracing makes many objects: collecting garbage took 8 % of the CPU time of two small training
    # steps.  What was imported and collected is left out, and collections are fewer.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


# How the reason of a skip begins that the end of the run must repeat in full.
NOT_CHECKED = "NOT CHECKED: "


def missing(reason):
    """What a skipped test would need, in a word or two."""
    if "has no record" in reason:
        return "a record of this libtpu"
    if module := re.search(r"could not import '(\w+)", reason):
        return module[1]
    for word in ("libtpu", "../shared"):
        if word in reason:
            return word
    return reason.split(":")[0]


def pytest_terminal_summary(terminalreporter):
    """Ends the run with what was skipped, and with what this machine therefore left unchecked."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in reports]
    counts = collections.Counter(map(missing, reasons))
    if counts:
        lines = ", ".join(f"{count} ({what})" for what, count in counts.most_common())
        terminalreporter.write_line(f"skipped for lack of: {lines}")
    for reason in sorted({reason for reason in reasons if reason.startswith(NOT_CHECKED)}):
        terminalreporter.write_line(f"WARNING: {reason}", yellow=True, bold=True)
