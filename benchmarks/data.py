"""Measures how fast text becomes tokens and tokens become batches, with two processes, and the
memory that takes.

    JAX_PLATFORMS=cpu python benchmarks/data.py hy.tiktoken [MEGABYTES ...]

hy.tiktoken is the released tokenizer file.

The text is that of the Python standard library, over and over, one file a row of a .jsonl; without
MEGABYTES 250 and 1000 of it.  Each size is tokenised by the command line with two processes;
memory is the peak of the largest process (`ru_maxrss`, workers included).
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hunyuan_jax.config import DataConfig, TrainConfig
from hunyuan_jax.data import loader, source, stream
from hunyuan_jax.tokenizer import load_tokenizer

NUM_WORKERS, SECONDS = 2, 8


def main(ranks: str, *megabytes: str) -> None:
    """Prints both tables."""
    with tempfile.TemporaryDirectory() as folder:
        print(
            "| tokenizer | text, MB | tokens | seconds | tokens/s | largest process, MB "
            "|\n|---|---|---|---|---|---|"
        )
        for size in megabytes or ("250", "1000"):
            text = write_text(Path(folder) / f"{size}.jsonl", int(size) * 10**6)
            for tokenizer in ("byte", ranks):
                print(
                    f"| {Path(tokenizer).name} | {size} | {' | '.join(tokenise(text, tokenizer))} "
                    "|",
                    flush=True,
                )
        print("\n| shards of | batch | tokens/s |\n|---|---|---|")
        for tokenizer in ("byte", ranks):
            for batch_size, seq_len in ((8, 256), (8, 4096)):
                speed = input_speed(shards_of(text, tokenizer), tokenizer, batch_size, seq_len)
                print(
                    f"| {Path(tokenizer).name} | {batch_size} x {seq_len} | {speed:,.0f} |",
                    flush=True,
                )


def write_text(path: Path, num_bytes: int) -> Path:
    """Rows of at least `num_bytes`."""
    rows = [
        json.dumps({"text": "".join(item.parts)}) + "\n"
        for span in source.find_files("stdlib", "source")
        for item in source.read(span, "text")
        if isinstance(item, source.Document)
    ]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            file.writelines(rows)
    return path


def shards_of(text: Path, tokenizer: str) -> Path:
    """Where `tokenise` puts them."""
    return text.with_name(f"{text.stem}-{Path(tokenizer).name}")


def tokenise(text: Path, tokenizer: str) -> list[str]:
    """Columns of the first table."""
    command = [
        sys.executable,
        "-m",
        "hunyuan_jax",
        "tokenize",
        f"--input={text}",
        f"--output={shards_of(text, tokenizer)}",
    ]
    command += [f"--tokenizer={tokenizer}", f"--num_workers={NUM_WORKERS}", "--json"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, process.returncode, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start  # with the start of the processes
    num_tokens = json.loads(output.splitlines()[-1])["num_tokens"]
    memory = usage.ru_maxrss / 1e3
    return [f"{num_tokens:,}", f"{seconds:.1f}", f"{num_tokens / seconds:,.0f}", f"{memory:,.0f}"]


def input_speed(shards: Path, tokenizer: str, batch_size: int, seq_len: int) -> float:
    """Tokens a second of the training iterator, median of five stretches."""
    data = DataConfig(source=str(shards), tokenizer=tokenizer)
    corpus = loader.open_corpus(data, load_tokenizer(tokenizer))
    order = loader.PackedRows(corpus, data, TrainConfig(batch_size=batch_size, seq_len=seq_len))
    speeds = []
    with contextlib.closing(stream.read_ahead(order)) as batches:
        for _ in range(20):
            next(batches)
        for _ in range(5):
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < SECONDS / 5:
                next(batches)
                count += 1
            speeds.append(count * batch_size * seq_len / (time.perf_counter() - start))
    return statistics.median(speeds)


if __name__ == "__main__":
    main(*sys.argv[1:])
