"""A tiny model that finds needles in 256 tokens, extended to 1K and to 4K by two more stages.

    python benchmarks/extension.py FOLDER

The stages are those of configs/a52b_32k.py and a52b_256k.py in small: each continues the workdir
of the one before (train.init_from) with rows four times as long, a RoPE alpha four times as high,
and a quarter of the rows from documents of at least half a row.  Prints Markdown tables of what
the model of each stage finds, by length and by depth, and of its loss by position.  A stage that
is finished is not repeated.

Documents are words of the Python standard library's source.  Between them a digit and a capital
are said once each; later `?` is followed by the digit again, and `!` by the capital.
"""

import dataclasses
import json
import math
import random
import re
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hunyuan_jax import config, from_pretrained, malloc, presets
from hunyuan_jax.infer.pretrained import Pretrained
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.train import loop

# What asks -> what can be the answer.
NEEDLES = {"?": "0123456789", "!": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
LENGTHS = {256: 50, 1024: 20, 4096: 10}  # tokens -> texts, each of which is asked twice
NUM_DEPTHS = 5
NUM_HELD_OUT = 20  # files whose words no stage trains on


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of the trainer; alpha: of RoPE."""

    name: str
    seq_len: int
    alpha: float
    num_steps: int
    batch_size: int
    peak_lr: float

    def config(self, folder: Path, before: str) -> config.Config:
        """As train.py takes it; `before` is the stage that it continues."""
        corpus = str(folder / f"text_{self.seq_len}")
        data = config.DataConfig(source=corpus)
        if before:
            data = config.quarter_long(corpus, self.seq_len // 2)
        return config.Config(
            model=model(self.alpha),
            data=data,
            schedule=config.ScheduleConfig(
                name="cosine_with_min_lr",
                peak_lr=self.peak_lr,
                min_lr=self.peak_lr / 10,
                warmup_steps=20,
            ),
            train=config.TrainConfig(
                num_steps=self.num_steps,
                batch_size=self.batch_size,
                seq_len=self.seq_len,
                init_from=str(folder / before) if before else "",
                eval_every=self.num_steps,
                eval_batches=4,
            ),
            checkpoint=config.CheckpointConfig(every=self.num_steps, keep=1),
        )


STAGES = (
    Stage("pretrain", 256, 1.0, 2500, 16, 5e-3),
    Stage("extend_1k", 1024, 4.0, 250, 4, 2e-3),
    Stage("extend_4k", 4096, 16.0, 150, 2, 2e-3),
)


def model(alpha: float) -> config.ModelConfig:
    """Two layers that share keys and values, with a dense MLP.

    Weights of 0.02 are small for a width of 64: attention then learns several times later.
    """
    return dataclasses.replace(
        presets.tiny(),
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        init_std=0.1,
        max_position=4096,
        rope_alpha=alpha,
        moe=config.MoeConfig(),
    )


def words_of(files: slice) -> list[str]:
    """Words of some of the standard library's files, in their order."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[files]
    return re.findall("[a-z]+", " ".join(path.read_text("utf-8") for path in paths).lower())


def running(words: Sequence[str], size: int, rng: random.Random) -> list[str]:
    """Words from a random place on, each with a blank, of at least `size` characters."""
    place, found = rng.randrange(len(words)), []
    while size > 0:
        found.append(words[place % len(words)] + " ")
        place, size = place + 1, size - len(found[-1])
    return found


def document(size: int, words: Sequence[str], rng: random.Random) -> str:
    """At least `size` characters, with a needle of each kind and one or some questions."""
    parts = running(words, size, rng)
    for sign, answers in NEEDLES.items():
        answer, place = rng.choice(answers), rng.randrange(len(parts))
        parts[place] = f"{answer} {parts[place]}"
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            parts[rng.randint(place, len(parts) - 1)] += f"{sign}{answer} "
    return "".join(parts)


def documents(seq_len: int, num_tokens: int, rng: random.Random) -> Iterator[str]:
    """Of a stage: short ones; where rows are long, also as long as half a row to a whole one."""
    words, has_long = words_of(slice(None, -NUM_HELD_OUT)), seq_len > STAGES[0].seq_len
    while num_tokens > 0:
        made = [document(rng.randint(20, 250), words, rng) for _ in range(seq_len // 50)]
        if has_long:
            made.append(document(rng.randint(seq_len // 2, seq_len), words, rng))
        yield from made
        num_tokens -= sum(map(len, made))


def write_corpus(folder: Path, stage: Stage) -> None:
    """Enough text that no row comes twice."""
    folder.mkdir(parents=True)
    rng = random.Random(stage.seq_len)
    num_tokens = 3 * stage.num_steps * stage.batch_size * stage.seq_len // 2
    with open(folder / "corpus.jsonl", "w") as file:
        for text in documents(stage.seq_len, num_tokens, rng):
            file.write(json.dumps({"text": text}) + "\n")


def asked(length: int, depth: int, words: Sequence[str], rng: random.Random) -> list[tuple]:
    """(text, answer) of each kind: the same words with both needles in a fifth of the text, and a
    question at the end, of `length` tokens together.
    """
    answers = {sign: rng.choice(some) for sign, some in NEEDLES.items()}
    room = length - 2 * len(answers) - 2  # and bos
    text = "".join(running(words, room, rng))[:room]
    for answer in answers.values():
        place = int((depth + rng.random()) * room / NUM_DEPTHS)
        place = text.rfind(" ", 0, place) + 1  # not within a word
        text = f"{text[:place]}{answer} {text[place:]}"
    return [(text + sign, answer) for sign, answer in answers.items()]


def measure(lm: Pretrained) -> tuple[dict, dict, dict]:
    """What a model finds by length, at the largest by depth, and its loss of words by position."""
    words, tokenizer = words_of(slice(-NUM_HELD_OUT, None)), load_tokenizer("byte")
    found, by_depth, losses = {}, {}, {}
    for length, num_texts in LENGTHS.items():
        rng, hits = random.Random(length), {depth: [] for depth in range(NUM_DEPTHS)}
        for i in range(num_texts):
            for text, answer in asked(length, i % NUM_DEPTHS, words, rng):
                ids = [tokenizer.bos_id, *tokenizer.encode(text)]
                logits_TV = np.asarray(lm.logits([ids]))[0]
                hits[i % NUM_DEPTHS].append(logits_TV[-1].argmax() == ord(answer))
                if length == max(LENGTHS):
                    log_probs_TV = logits_TV - np.logaddexp.reduce(logits_TV, -1, keepdims=True)
                    for t, letter in enumerate(text):
                        if letter.islower():
                            bucket = 2 ** int(math.log2(t + 1))
                            losses.setdefault(bucket, []).append(-log_probs_TV[t, ids[t + 1]])
        found[length] = np.mean([hit for some in hits.values() for hit in some])
        by_depth = {f"depth {depth}": np.mean(some) for depth, some in hits.items()}
    return found, by_depth, {place: np.mean(some) for place, some in losses.items()}


def print_table(title: str, rows: dict[str, dict], form: str) -> None:
    """Markdown: a row a stage."""
    columns = list(next(iter(rows.values())))
    print(f"\n| {title} | {' | '.join(map(str, columns))} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(format(row[column], form) for column in columns)} |")


def main(folder: Path) -> None:
    """Trains what is missing, and prints the tables."""
    began, before, results = time.monotonic(), "", {}
    for stage in STAGES:
        if not (folder / f"text_{stage.seq_len}").exists():
            write_corpus(folder / f"text_{stage.seq_len}", stage)
        if loop.run(stage.config(folder, before), folder / stage.name):
            sys.exit(1)
        before = stage.name
        results[stage.name] = measure(from_pretrained(folder / stage.name))
    found, by_depth, losses = (
        {name: result[i] for name, result in results.items()} for i in range(3)
    )
    print_table("found, of tokens", found, ".0%")
    print_table(f"found in {max(LENGTHS)}", by_depth, ".0%")
    print_table("nats a letter, from position", losses, ".3f")
    print(f"\n{(time.monotonic() - began) / 60:.1f} min, {time.process_time() / 60:.1f} CPU min")


if __name__ == "__main__":
    malloc.restart_with_huge_pages()
    main(Path(sys.argv[1]).resolve())
