"""Hub ids, fetched from a small hub on loopback with the real huggingface_hub; what goes wrong is
one line with the remedy.
"""

import os
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from hunyuan_jax import hub
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.storage import Place
from support import hub_server


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with org/name in two revisions, and an empty cache."""
    for name in ("main", "v2"):
        folder = tmp_path / name
        (folder / "inner").mkdir(parents=True)
        (folder / "config.json").write_text(f'{{"revision": "{name}"}}')
        (folder / "inner" / "config.json").write_text("{}")
        (folder / "weights.bin").write_bytes(bytes(range(256)) * 40)
    with hub_server.serving() as server:
        server.folders["org/name"] = {name: tmp_path / name for name in ("main", "v2")}
        hub_server.point_to(server.endpoint, tmp_path / "cache", monkeypatch)
        yield server


def folder_of(path, patterns):
    """The local folder of a hub id."""
    return Place(path, patterns=patterns).path()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", ("org/name", None, "")),
        ("org/name@v1.0", ("org/name", "v1.0", "")),
        ("hf://org/name@refs/pr/3/a/b", ("org/name", "refs/pr/3", "a/b")),
        ("org/name/a", ("org/name", None, "a")),
        ("name", None),
        ("/org/name", None),
        ("./org/name", None),
        ("../name", None),
        ("org/name/", None),
        ("gs://org/name", None),
    ],
)
def test_what_an_id_is(path, expected):
    assert hub.hub_id(path) == (expected and hub.HubId(*expected))


def test_what_exists_here_is_not_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert hub.hub_id("org/name") is None
    assert hub.hub_id("org/nmae") is None
    assert hub.hub_id("hf://org/name") == hub.HubId("org/name", None, "")
    with pytest.raises(ConfigError, match="hf://ORG/NAME@REVISION"):
        hub.hub_id("hf://name")


def test_revisions_and_inner_folders(served):
    main = Path(folder_of("org/name", ["*.json"]))
    other = Path(folder_of("org/name@v2", ["config.json"]))
    assert [(f / "config.json").read_text() for f in (main, other)] == [
        '{"revision": "main"}',
        '{"revision": "v2"}',
    ]
    assert not (main / "weights.bin").exists()
    inner = Path(folder_of("org/name/inner", ["config.json"]))
    assert (inner.parent, inner.name) == (main, "inner")
    assert folder_of(str(main), ["*"]) == str(main)


def test_what_is_in_the_cache_is_not_fetched_again_nor_needed_online(served, monkeypatch):
    first = folder_of("org/name", ["config.json"])
    served.requests.clear()
    assert folder_of("org/name", ["config.json"]) == first
    assert served.fetched() == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    served.requests.clear()
    assert folder_of("org/name", ["config.json"]) == first
    assert served.requests == []
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set; unset it once"):
        folder_of("org/name@v2", ["config.json"])


def test_a_broken_download_continues_where_it_broke(served, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    data = bytes(range(256)) * 40
    served.break_after = [4096]
    folder = folder_of("org/name", ["weights.bin"])
    assert Path(folder, "weights.bin").read_bytes() == data
    assert [part for _, _, part in served.requests if part] == ["bytes=4000-"]


def test_after_a_download_that_broke_off_the_same_call_fetches_what_is_missing(
    served, monkeypatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    folder_of("org/name", ["config.json"])
    served.break_after = [4096, *[0] * 20]
    with pytest.raises(ConfigError, match=r"of org/name .* broke off .* that are missing\."):
        folder_of("org/name", ["*.json", "weights.bin"])
    served.break_after.clear()
    served.requests.clear()
    folder = folder_of("org/name", ["*.json", "weights.bin"])
    assert Path(folder, "weights.bin").read_bytes() == bytes(range(256)) * 40
    assert "config.json" not in served.fetched()


def test_refusals_are_one_line_with_the_remedy(served, tmp_path, monkeypatch):
    def refused(path):
        with pytest.raises(ConfigError) as caught:
            folder_of(path, ["config.json"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused("org/none").startswith(
        f"org/none does not exist, neither here nor on {served.endpoint}; check the name."
    )
    assert "no revision 'v9'; give a branch" in refused("org/name@v9")
    served.gated.add("org/name")
    assert f"accept its licence at {served.endpoint}/org/name" in refused("org/name")
    hub_server.point_to("http://127.0.0.1:9", tmp_path / "other", monkeypatch)
    assert "http://127.0.0.1:9 cannot be reached" in refused("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refused("org/name").endswith("pip install -e '.[hub]'.")


def test_a_full_disk(served, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(ConfigError, match="the disk is full; make room, or set HF_HOME"):
        folder_of("org/name", ["config.json"])
