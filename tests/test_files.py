"""Files that are there as a whole or not at all, here and on file systems that are not local."""

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem

from hunyuan_jax import files
from hunyuan_jax.errors import ConfigError


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A file system that is not local, over a folder: what is written is in place when it is
    committed.
    """
    monkeypatch.setattr(files, "_UPLOAD_BYTES", 1000)
    (tmp_path / "bucket").mkdir()
    return DirFileSystem(str(tmp_path / "bucket"), fsspec.filesystem("file"))


@pytest.mark.parametrize("data", [b"", b"\r", b"text\n", bytes(range(256)) * 20])
def test_a_file_arrives_byte_for_byte(tmp_path, bucket, data):
    (tmp_path / "source").write_bytes(data)
    files.upload(bucket, "target", files.blocks(tmp_path / "source"))
    assert bucket.cat_file("target") == data
    files.write_whole(tmp_path / "copy", data)
    assert (tmp_path / "copy").read_bytes() == data


def test_blocks_are_no_larger_than_memory_allows(tmp_path, bucket):
    (tmp_path / "source").write_bytes(bytes(2500))
    assert [len(block) for block in files.blocks(tmp_path / "source")] == [1000, 1000, 500]


def broken():
    yield b"half"
    raise RuntimeError("the rest is missing")


@pytest.mark.parametrize("before", [None, b"old"])
def test_what_fails_leaves_what_was_there(tmp_path, bucket, before):
    if before:
        bucket.pipe_file("target", before)
        files.write_whole(tmp_path / "target", before)
    with pytest.raises(RuntimeError, match="the rest is missing"):
        files.upload(bucket, "target", broken())
    assert bucket.exists("target") == bool(before)
    assert not before or bucket.cat_file("target") == before
    with (
        pytest.raises(RuntimeError, match="the rest"),
        files.replacing(tmp_path / "target", tmp_path / "new") as temporary,
    ):
        temporary.write_bytes(b"".join(broken()))
    assert not before or (tmp_path / "target").read_bytes() == before


def test_an_address_that_cannot_be_used_names_its_option():
    assert files.filesystem("memory://a/b/", "the folder")[1] == "/a/b"
    with pytest.raises(
        ConfigError,
        match=r"the folder = 'nowhere://a' cannot be used: .*nowhere.* It must be a URL that "
        r"fsspec knows",
    ):
        files.filesystem("nowhere://a", "the folder")
