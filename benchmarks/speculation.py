"""Measures speculative decoding: how many drafted tokens are accepted, and what that gains.

    python benchmarks/speculation.py FOLDER ngram:4 mtp:1 SMALL_FOLDER:4 [file=PROMPTS] [new=128] \
        [rounds=3] [temperature=0]

PROMPTS is a text file of prompts, with lines of "----" between them; without it, the prompts ask
for a small edit of a piece of code, by the chat template where the folder has one.  They are
answered one after the other and then together, in turns with the engine without drafts: the first
round, with compilation, is not timed.  CPU seconds count all threads of the process.
"""

import statistics
import sys
import time
from pathlib import Path

import hunyuan_jax
from hunyuan_jax.infer.request import Limits, Request

CODE = '''class Account:
    """A bank account."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
'''
EDITS = (
    "Rename the class to Wallet and write the whole code again.",
    "Add a type hint to every argument and write the whole code again.",
    "Write the same code again, without the docstring.",
    "Write the same code again, with `total` in place of `balance`.",
)


def main(folder: str, *words: str) -> None:
    """Prints a markdown table."""
    options = dict(word.split("=", 1) for word in words if "=" in word)
    lm = hunyuan_jax.load(folder)
    prompts = _prompts(lm, options.get("file"))
    num_new, temperature = int(options.get("new", 128)), float(options.get("temperature", 0))
    settings = {"repetition_penalty": 1, "stop_ids": lm.stop_ids, "max_new_tokens": num_new}
    sampling = hunyuan_jax.Sampling(temperature=temperature, **settings).resolved({})
    engines = {"none": lm.model.new_engine(Limits(max_rows=len(prompts)))}
    for word in words:
        if "=" not in word:
            kind, _, num = word.rpartition(":")
            limits = Limits(len(prompts), speculate=kind, speculate_tokens=int(num))
            engines[word] = lm.model.new_engine(limits)
    found = {(name, batch): [] for batch in (1, len(prompts)) for name in engines}
    tokens = {}
    for turn in range(int(options.get("rounds", 3)) + 1):
        for (name, batch), results in found.items():
            *figures, answer = _measure(engines[name], prompts, batch, sampling, str(turn))
            tokens.setdefault((name, batch), answer)
            results.append(figures)
    print(
        "| answers at a time | drafts | accepted | tokens a step | tokens/s | ratio | CPU ms a "
        "token | ratio | answers as without |\n" + "|---" * 9 + "|"
    )
    for (name, batch), results in found.items():
        speed, cpu, accepted, a_step = (
            statistics.median(column) for column in zip(*results[1:], strict=True)
        )
        base = [statistics.median(c) for c in zip(*found["none", batch][1:], strict=True)]
        same = sum(a == b for a, b in zip(tokens[name, batch], tokens["none", batch], strict=True))
        print(
            f"| {batch} | {name} | {accepted:.0%} | {a_step:.2f} | {speed:.1f} | "
            f"{speed / base[0]:.2f} | {1000 * cpu:.1f} | {base[1] / cpu:.2f} | "
            f"{same} of {len(prompts)} |"
        )
    print(f"\nload of the last minute: {Path('/proc/loadavg').read_text().split()[0]}")


def _prompts(lm, file: str | None) -> list[list[int]]:
    if file is not None:
        return [lm.tokenizer.encode(t) for t in Path(file).read_text().split("----\n")]
    texts = [f"{edit}\n\n```python\n{CODE}```" for edit in EDITS]
    if lm.tokenizer.chat_template is None:
        return [lm.tokenizer.encode(text) for text in texts]
    return [lm.chat_ids([{"role": "user", "content": text}]) for text in texts]


def _measure(engine, prompts, batch, sampling, salt):
    """(tokens/s, CPU seconds a token, share accepted, tokens a step of a row, the answers)."""
    answers: list[list[int]] = [[] for _ in prompts]
    before, start, cpu = engine.stats(), time.perf_counter(), time.process_time()
    for first in range(0, len(prompts), batch):
        requests = [
            Request(str(i), tuple(prompts[i]), sampling, cache_salt=salt)
            for i in range(first, first + batch)
        ]
        for output in engine.run(requests):
            answers[first + int(output.id)] += output.tokens
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    after, num = engine.stats(), sum(map(len, answers))
    drafted = after.draft_tokens - before.draft_tokens
    accepted = after.accepted_tokens - before.accepted_tokens
    share = accepted / drafted if drafted else 0.0
    return num / seconds, cpu / num, share, num / max(num - accepted, 1), answers


if __name__ == "__main__":
    main(*sys.argv[1:])
