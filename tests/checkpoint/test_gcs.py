"""gs:// through gcsfs, against an emulator of Google's service: text, checkpoints of a run that
loses its machine, conversion.
"""

import shutil
import signal
import socket

import pytest

from hunyuan_jax.checkpoint import manifest
from hunyuan_jax.data import shards, source, tokenize, tokens
from hunyuan_jax.weights import stream
from hunyuan_jax.weights.open import export_model
from support.folders import contents, write_source
from support.processes import KILLER, finished, losses, run, start, write_corpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]  # sockets of gcsfs, closed by the interpreter


@pytest.fixture(scope="module")
def fs(tmp_path_factory):
    """The emulator's file system, with the text of a run in bucket/text."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        pytest.MonkeyPatch.context() as patch,
        emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"),
    ):
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        # Read when gcsfs is imported: or it asks for a minute what kind of bucket that is, by
        # another service.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        made = pytest.importorskip("gcsfs").GCSFileSystem()
        made.put(
            f"{write_corpus(tmp_path_factory.mktemp('text'))}/", "bucket/text/", recursive=True
        )
        yield made


def test_a_run_that_loses_its_machine_goes_on_from_the_bucket(fs, tmp_path):
    """Text and mirror behind gs://: killed, the workdir deleted, started again elsewhere, bit for
    bit as if undisturbed.
    """
    fields = {"train.num_steps": 60, "checkpoint.every": 10}
    run("gs://bucket/text", tmp_path / "whole", **fields)
    fields |= {"checkpoint.mirror": "gs://bucket/run"}
    status, error = finished(
        start(
            "gs://bucket/text", tmp_path / "run", ("-c", KILLER, "in a step", "45", "0"), **fields
        )
    )
    assert status == -signal.SIGKILL, error
    shutil.rmtree(tmp_path / "run")
    error = run("gs://bucket/text", tmp_path / "run", **fields)
    found, expected = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert (
        f"checkpoint {min(found) - 1} was brought back from gs://bucket/run" in error
        and min(found) > 10
    )
    assert found == {step: expected[step] for step in range(min(found), 61)}
    fs.invalidate_cache()
    assert sorted(path.rsplit("/", 1)[1] for path in fs.ls("bucket/run")) == ["40", "50", "60"]
    for step in (40, 50, 60):
        there = manifest.parse(fs.cat_file(f"bucket/run/{step}/manifest.json"))
        fs.get(f"bucket/run/{step}/", f"{tmp_path}/{step}/", recursive=True)
        assert manifest.problem(tmp_path / str(step), there, there["files"]) is None
    damaged = fs.cat_file("bucket/run/60/state/_METADATA")
    fs.pipe_file("bucket/run/60/state/_METADATA", damaged[:-1])
    shutil.rmtree(tmp_path / "run")
    error = run("gs://bucket/text", tmp_path / "run", **fields)
    assert (
        "checkpoint 60 in the mirror is damaged: state/_METADATA has" in error
        and "is now bucket/run/damaged-60" in error
    )
    assert losses(tmp_path / "run") == {step: expected[step] for step in range(51, 61)}


def test_token_shards_of_a_bucket_are_those_of_a_folder(fs, tmp_path):
    rows = "".join(f'{{"text": "row {i} {"abc " * (i % 50)}"}}\n' for i in range(5000))
    fs.pipe_file("bucket/rows/a.jsonl", rows.encode())
    fs.put_file(source.find_files("stdlib", "data.source")[0].path, "bucket/rows/b.py")
    fs.get("bucket/rows/", f"{tmp_path}/rows/", recursive=True)
    made = []
    for input in ("gs://bucket/rows", str(tmp_path / "rows")):
        output = tmp_path / f"shards{len(made)}"
        made.append(
            tokenize.tokenize(
                shards.Job(input, str(output), "byte", shard_bytes=10**5), num_workers=2
            )
        )
        assert tokens.damaged_files(output) == []
    assert made[0]["shards"] == made[1]["shards"] and len(made[0]["shards"]) > 3


def test_conversion_in_a_bucket_is_that_of_a_folder(fs, tmp_path):
    folder = write_source(tmp_path / "source")
    fs.put(f"{folder}/", "bucket/source/", recursive=True)
    assert (
        stream.import_model("gs://bucket/source", "gs://bucket/ours")
        == stream.import_model(folder, tmp_path / "ours")
        > 0
    )
    assert stream.import_model("gs://bucket/source", "gs://bucket/ours") == 0
    export_model("gs://bucket/ours", "gs://bucket/back")
    ours = {
        name: data.replace(str(folder).encode(), b"gs://bucket/source")
        for name, data in contents(tmp_path / "ours").items()
    }
    for name, expected in (("ours", ours), ("back", contents(folder))):
        assert {
            path.removeprefix(f"bucket/{name}/"): fs.cat_file(path)
            for path in fs.find(f"bucket/{name}")
        } == expected
