"""Converts a checkpoint with all tensors of a52b at reduced width.

    python benchmarks/convert.py FOLDER [--width=320] [--ffn=912] [--kills=20]

Writes FOLDER/source (2 GB by default, 8 shards), then runs import, export and verify in processes
of their own and prints the time, GB/s and peak memory of each.
"""

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from hunyuan_jax.weights import hf_config
from hunyuan_jax.weights import names as table
from hunyuan_jax.weights.write import header

ROOT = Path(__file__).parents[1]


def write_source(folder: Path, hf: dict, num_shards: int) -> int:
    """Random bfloat16 weights of a config; returns their bytes."""
    entries = table.entries(hf_config.from_hf(hf))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf))
    files = {
        e.name: f"model-{i * num_shards // len(entries) + 1:05d}-of-{num_shards:05d}.safetensors"
        for i, e in enumerate(entries)
    }
    rng, dtype, total = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16), 0
    for file in dict.fromkeys(files.values()):
        part = [e for e in entries if files[e.name] == file]
        with open(folder / file, "wb") as f:
            f.write(header([(e.name, dtype, e.shape) for e in part]))
            for entry in part:
                scale = 0.05 if len(entry.shape) == 2 else 1.0
                data = (rng.standard_normal(entry.shape, np.float32) * scale).astype(dtype)
                total += f.write(data.tobytes())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": files})
    )
    return total


def run_killed(folder: Path, num_kills: int) -> None:
    """Imports and exports again, both with kill -9 at random moments."""
    for name in ("checkpoint", "back"):
        shutil.rmtree(folder / name)
    source, checkpoint, back = (folder / name for name in ("source", "checkpoint", "back"))
    kill(
        ["import", f"--source={source}", f"--output={checkpoint}"],
        checkpoint / "conversion.json",
        num_kills,
    )
    kill(
        ["export", f"--checkpoint={checkpoint}", f"--output={back}"],
        back / "export.json",
        num_kills,
    )
    same = subprocess.run(["diff", "-r", source, back], check=False).returncode == 0
    print(f"export is {'byte-identical' if same else 'DIFFERENT'}")


def kill(arguments: list[str], about: Path, num_kills: int) -> None:
    """Kills a command at random moments of its work, which begins when it writes the file `about`;
    then lets it finish.
    """
    command = [sys.executable, ROOT / "convert_torch.py", *arguments]
    done = 0
    for _ in range(num_kills):
        before = about.stat().st_mtime_ns if about.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while (
            process.poll() is None
            and (about.stat().st_mtime_ns if about.exists() else 0) == before
        ):
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 0.25))
        done += process.poll() is None
        process.kill()
        process.wait()
    subprocess.run(command, check=True)
    print(f"{arguments[0]}: killed {done} times, then finished", flush=True)


def main() -> None:
    """Runs the three commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--ffn", type=int, default=912)
    parser.add_argument(
        "--kills",
        type=int,
        default=0,
        help="Afterwards import and export again, each killed this often.",
    )
    args = parser.parse_args()
    hf = {
        "model_type": "hunyuan", "vocab_size": 1024, "hidden_size": args.width,
        "intermediate_size": args.ffn, "num_hidden_layers": 64,
        "num_attention_heads": args.width // 80, "num_key_value_heads": 1, "use_cla": True,
        "cla_share_factor": 2, "num_experts": 16, "moe_topk": 1, "use_mixed_mlp_moe": True,
        "num_shared_expert": 1, "use_qk_norm": True, "tie_word_embeddings": True,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
        "torch_dtype": "bfloat16", "max_position_embeddings": 4096,
    }  # fmt: skip
    source, checkpoint, back = (args.folder / name for name in ("source", "checkpoint", "back"))
    total = write_source(source, hf, 8)
    print(f"{total / 1e9:.3f} GB, {len(table.entries(hf_config.from_hf(hf)))} tensors")
    for command in (
        ("import", f"--source={source}", f"--output={checkpoint}"),
        ("export", f"--checkpoint={checkpoint}", f"--output={back}"),
        ("verify", f"--source={source}", f"--checkpoint={checkpoint}"),
    ):
        begin = time.monotonic()
        subprocess.run([sys.executable, ROOT / "convert_torch.py", *command], check=True)
        seconds = time.monotonic() - begin
        # The largest of the children so far: import and export come before verify, which needs the
        # most.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(
            f"{command[0]}: {seconds:.1f} s with start, {total / seconds / 1e9:.2f} GB/s, peak "
            f"memory {peak / 1e9:.2f} GB",
            flush=True,
        )
    same = subprocess.run(["diff", "-r", source, back], check=False).returncode == 0
    print("export is byte-identical" if same else "EXPORT DIFFERS", flush=True)
    # What the disk and the copy alone take: the same bytes into as many files.
    begin = time.monotonic()
    subprocess.run(["cp", "-r", checkpoint, args.folder / "copy"], check=True)
    seconds = time.monotonic() - begin
    print(
        f"cp -r of the checkpoint: {seconds:.1f} s, {total / seconds / 1e9:.2f} GB/s", flush=True
    )
    shutil.rmtree(args.folder / "copy")
    if args.kills:
        run_killed(args.folder, args.kills)


if __name__ == "__main__":
    main()
