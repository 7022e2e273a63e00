"""Measures the seconds from the start of a command to its first answer.

    python benchmarks/start.py MODEL [FLAG ...]

Serves the model with an empty cache of compiled programs and once more with the filled one, and
asks for 8 tokens every 0.05 s until they come; then chats, where the model has a chat template,
with an empty and the filled cache, until the first character of an answer.  Flags are those of
`serve`, such as --tokenizer=byte.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

REPO = Path(__file__).parents[1]


def main(model: str, *flags: str) -> None:
    """Prints a markdown table."""
    measures = {"serve": served}
    about = Path(model, "tokenizer_config.json")
    if about.is_file() and "chat_template" in json.loads(about.read_text()):
        measures["chat"] = chatted
    print("| command | cache of compiled programs | seconds | of which CPU |\n|---|---|---|---|")
    for command, measure in measures.items():
        with tempfile.TemporaryDirectory() as cache:
            env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": str(REPO)}
            for state in ("empty", "filled"):
                seconds, cpu = measure(model, flags, env)
                print(f"| {command} | {state} | {seconds:.1f} | {cpu:.1f} |", flush=True)
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"\nload of the last minute: {load}")


def served(model: str, flags: tuple[str, ...], env: dict[str, str]) -> tuple[float, float]:
    """(seconds to the first answer of a server, CPU seconds until then)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    body = json.dumps({"prompt": "What is", "max_tokens": 8}).encode()
    url, headers = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
    start, process = begun(["serve", f"--checkpoint={model}", f"--port={port}", *flags], env)
    while process.poll() is None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, body, headers)).read()
            break
        except (urllib.error.URLError, ConnectionError) as error:
            if getattr(error, "code", 503) != 503:
                raise
            time.sleep(0.05)
    return ended(process, start)


def chatted(model: str, _: tuple[str, ...], env: dict[str, str]) -> tuple[float, float]:
    """As `served`, of a question to `chat`."""
    flags = ["--max_new_tokens=8", "--temperature=0"]
    start, process = begun(["chat", f"--checkpoint={model}", *flags], env)
    process.stdin.write(b"Who are you?\n")
    process.stdin.flush()
    while process.poll() is None and process.stdout.read(1).isspace():
        pass
    return ended(process, start)


def begun(arguments: list[str], env: dict[str, str]) -> tuple[float, subprocess.Popen]:
    """(when it was started, the command)."""
    command = [sys.executable, "-m", "hunyuan_jax", *arguments]
    start, pipe = time.perf_counter(), subprocess.PIPE
    process = subprocess.Popen(
        command, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0
    )
    return start, process


def ended(process: subprocess.Popen, start: float) -> tuple[float, float]:
    """Seconds since the start, and CPU seconds; ends the command, whose programs are then kept."""
    seconds = time.perf_counter() - start
    if process.poll() is not None:
        sys.exit(f"{' '.join(process.args)} ended with {process.returncode}; see what it says.")
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    process.stdin.close()
    process.terminate()
    process.wait()
    return seconds, cpu


if __name__ == "__main__":
    main(*sys.argv[1:])
