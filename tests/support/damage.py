"""Damages the files of a checkpoint."""

import os


def largest_file(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda folder: os.truncate(largest_file(folder), 100),
    "missing": lambda folder: largest_file(folder).unlink(),
    "bit flip": lambda folder: flip_bit(largest_file(folder)),
    "empty file": lambda folder: os.truncate(folder / "optimizer" / "_METADATA", 0),
    "manifest": lambda folder: os.truncate(folder / "manifest.json", 100),
}
