"""What few bits cost: a model whose projections are quantised in several ways, against itself.

    python benchmarks/quantization.py MODEL TEXT... [--tokens=2048] [--row=512]
        [--table=methods|range|cache|choices] [--choices=float32,...]
    python benchmarks/quantization.py MODEL --table=speed|quantize

methods: one line a way, with the bytes of an entry, of each text (its first tokens, in rows) the
perplexity and the Kullback-Leibler divergence from the model in float32, in nats a token, the
relative error of the weights and the share of outliers: counterparts of EasyQuant's tables 1, 2, 4
and 7 (arXiv 2403.02775).
range: by step of its optimisation the range, and the perplexity with outliers clipped to it and
with exact ones: tables 5 and 9.
choices: of each choice of `--quantize` the bytes of an entry, perplexity and divergence and tokens
a second as `speed`, by this device; and with libtpu the static cycles of a token's products on
each chip, in thousands by the compiler: nothing is run, and attention is left out.
cache: of each choice of `--cache_dtype` the bytes of a token, the perplexity, the error of the
tokens' log-probabilities in nats (mean, 99 %, largest), and of the answers to three prompts the
first token that is another.
speed: tokens a second of a prompt of 64 tokens and 64 greedy ones, end to end.
quantize: of each method of the command CPU seconds, compilation included, and by them GB of
bfloat16 a second on all cores.
Figures: docs/results/quantization.md.
"""

import argparse
import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import hunyuan_jax
from hunyuan_jax import Sampling
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer import score
from hunyuan_jax.infer.request import Limits, Request
from hunyuan_jax.model.cache import empty_cache
from hunyuan_jax.plan import hlo, hlo_text, topology
from hunyuan_jax.quant import codes, easyquant
from hunyuan_jax.quant.array import Outliers, QuantArray, product
from hunyuan_jax.weights import few_bits, hf_config, names, reference
from hunyuan_jax.weights.open import open_model
from hunyuan_jax.weights.quantize import quantize_model
from pallas_kernels import tpu_compiler

_NO_OUTLIERS = float("inf")
_CALIBRATION = "hunyuan_jax/weights/quantized.py"  # text for GPTQ
_CHIPS = ("v5e:1x1", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1")
# Of what `choices` shows, numbers in these dtypes and then methods.
_NUMBERS = {"float32": 4.0, "bfloat16": 2.0}
_CHOICES = (*_NUMBERS, "int8", "fp8", "int4", "easyquant", "w8a8", "w8a8-fp8")
_OUTLIERS = 0.007  # of a matrix, for cycles


def easy(num_sigma, num_steps):
    """EasyQuant, or a part of it."""
    return lambda name, w: codes.Codes(*easyquant.easyquant_int4(w, num_sigma, num_steps))


def methods(group, hessian):
    """Name -> (name of a matrix, matrix -> Codes)."""
    return {
        "int4 RTN, channel": easy(_NO_OUTLIERS, 0),
        "optimise only": easy(_NO_OUTLIERS, 100),
        "isolate only, n = 3": easy(3.0, 0),
        "EasyQuant, n = 3": easy(3.0, 100),
        f"int4, groups of {group}": lambda name, w: codes.int4(w, group),
        f"GPTQ, groups of {group}": lambda name, w: gptq(w, hessian[name], group),
        "int8, channel": lambda name, w: codes.int8(w, group),
        "fp8, channel": lambda name, w: codes.fp8(w, group),
        "EasyQuant, n = 2": easy(2.0, 100),
        "EasyQuant, n = 2.5": easy(2.5, 100),
        "EasyQuant, n = 4": easy(4.0, 100),
        "isolate only, n = 2": easy(2.0, 0),
        "isolate only, n = 2.5": easy(2.5, 0),
        "isolate only, n = 4": easy(4.0, 0),
        "isolate only, n = 6": easy(6.0, 0),
    }


def gptq(w_OI, hessian_II, group):
    """GPTQ (arXiv 2210.17323) in order of the inputs: the error of each input is put onto those
    that follow it.
    """
    w_OI = w_OI.astype(np.float64)
    # An expert that the text does not reach has seen nothing.
    damping = max(0.01 * np.diag(hessian_II).mean(), 1e-6)
    damped_II = hessian_II + damping * np.eye(len(hessian_II))
    upper_II = np.linalg.cholesky(np.linalg.inv(damped_II)).T
    values_OI, scales = np.empty(w_OI.shape, np.int8), []
    for start in range(0, w_OI.shape[1], group):
        end = start + group
        found = codes.int4(w_OI[:, start:end], group)
        scales.append(found.scale)
        error_OI = np.empty((len(w_OI), group))
        for i in range(start, end):
            values_OI[:, i] = np.clip(np.rint(w_OI[:, i] / found.scale[:, 0]), -7, 7)
            error_O = (w_OI[:, i] - values_OI[:, i] * found.scale[:, 0]) / upper_II[i, i]
            w_OI[:, i:end] -= np.outer(error_O, upper_II[i, i:end])
            error_OI[:, i - start] = error_O
        w_OI[:, end:] -= error_OI @ upper_II[start:end, end:]
    return codes.Codes(values_OI, np.concatenate(scales, 1), 4)


class _Recorded:
    """A matrix that adds up the products of the inputs that it is multiplied with."""

    __array_ufunc__ = None  # so that `array @ it` is asked of it

    def __init__(self, w_OI, total_II):
        self._w_OI, self._total_II = w_OI, total_II
        self.shape = w_OI.shape

    @property
    def T(self):
        return self

    def __rmatmul__(self, x_TI):
        self._total_II += x_TI.T @ x_TI
        return x_TI @ self._w_OI.T


def official_config(opened):
    """config.json as weights/reference.py reads it."""
    if opened.layout is not None:
        return json.loads(opened.layout.texts["config.json"])
    # A run may have heads of a width that the official format cannot state.
    cfg = dataclasses.replace(opened.cfg, head_dim=opened.cfg.hidden_size // opened.cfg.num_heads)
    return hf_config.to_hf(cfg) | {"head_dim": opened.cfg.head_dim}


def hessians(opened, ids):
    """Name of a matrix -> sums of products of its inputs [I, I] over a text."""
    hf = official_config(opened)
    entries = {entry.name: entry for entry in opened.entries}
    total = {
        name: np.zeros((entry.shape[1],) * 2, np.float32)
        for name, entry in entries.items()
        if few_bits.is_quantizable(entry)
    }

    def read(name):
        tensor = np.asarray(opened.tensor(entries[name]), np.float32)
        return _Recorded(tensor, total[name]) if name in total else tensor

    for row in ids:
        x_TD, kv = reference.embed(read, row), None
        for index in range(hf["num_hidden_layers"]):
            x_TD, kv = reference.layer(hf, read, index, x_TD, kv)
    return total


def rows_of(lm, path, num_tokens, row):
    """The first tokens of a text, [rows, row]."""
    ids = lm.tokenizer.encode(pathlib.Path(path).read_text("utf-8"))[:num_tokens]
    return np.array(ids[: len(ids) // row * row]).reshape(-1, row)


class Trial:
    """A model and rows of text, and what its matrices are replaced by."""

    def __init__(self, folder, texts, num_tokens, row):
        lm, self.opened = hunyuan_jax.load(folder, dtype="float32"), open_model(folder, "float32")
        self.folder, self.model, self.numbers = folder, lm.model, lm.model.params
        self.rows = [rows_of(lm, text, num_tokens, row) for text in texts]
        self.calibration = rows_of(lm, _CALIBRATION, 2048, row)
        self._truth = [[self._logprobs(row) for row in rows] for rows in self.rows]

    def _logprobs(self, row):
        logits_TV = np.array(self.model.logits(row[None])[0, :-1], np.float32)
        logits_TV -= logits_TV.max(-1, keepdims=True)
        logits_TV -= np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        return logits_TV

    def quantize(self, way, visit=lambda entry, codes: None):
        """Replaces every projection by its codes times their scale; (bytes of an entry, relative
        error).
        """
        made = {path: np.array(leaf) for path, leaf in flat(self.numbers)}
        error = total = size = num_bytes = 0
        for entry in self.opened.entries:
            if few_bits.is_quantizable(entry):
                w_OI = np.asarray(self.opened.tensor(entry), np.float32)
                found = way(entry.name, w_OI)
                visit(entry, found)
                dense_OI = codes.dequantized(found)
                error += float(((dense_OI - w_OI) ** 2).sum())
                total += float((w_OI**2).sum())
                size, num_bytes = size + w_OI.size, num_bytes + found.num_bytes
                made[entry.path][entry.index] = names.to_ours(dense_OI, entry, entry.our_shape)
        self.model.params = nested(made)
        return num_bytes / size, (error / total) ** 0.5

    def measure(self):
        """(perplexity, divergence) of each text."""
        found = []
        for rows, truths in zip(self.rows, self._truth, strict=True):
            losses, divergences = [], []
            for row, truth_TV in zip(rows, truths, strict=True):
                now_TV = self._logprobs(row)
                losses.append(-np.take_along_axis(now_TV, row[1:, None], 1).mean())
                divergences.append((np.exp(truth_TV) * (truth_TV - now_TV)).sum(-1).mean())
            found.append((np.exp(np.mean(losses)), np.mean(divergences)))
        return found


def flat(tree, path=()):
    """(path, array) of nested parameters."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, (*path, name))
        else:
            yield "/".join((*path, name)), value


def nested(made):
    """Inverse of `flat`."""
    tree = {}
    for path, value in made.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree


def show_methods(trial):
    """Prints the table of methods."""

    def line(name, num_bytes, error=0.0, share=0.0):
        figures = "  ".join(f"{ppl:9.4f} {kl:7.4f}" for ppl, kl in trial.measure())
        print(f"{name:24s} {num_bytes:6.3f}  {figures}  {error:7.4f} {100 * share:7.3f}%", flush=1)

    print(f"{'':24s}  bytes  {'perplexity and divergence':36s}    error  outliers")
    line("float32", 4)
    trial.model.params = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(x.dtype), trial.numbers
    )
    line("bfloat16", 2)
    hessian = hessians(trial.opened, trial.calibration)
    for name, way in methods(few_bits.group_of(trial.opened.entries), hessian).items():
        shares = collections.defaultdict(list)

        def visit(entry, found, shares=shares):
            if found.position is not None:
                share = len(found.position) / found.values.size
                shares[entry.name.split(".")[-2]].append(share)

        num_bytes, error = trial.quantize(way, visit)
        every = [share for of in shares.values() for share in of]
        line(name, num_bytes, error, np.mean(every) if every else 0.0)
        if name == "EasyQuant, n = 3":
            kinds = "  ".join(f"{kind} {100 * np.mean(of):.3f}%" for kind, of in shares.items())
            print(f"  outliers by kind: {kinds}")


def show_range(trial):
    """Prints the table of steps."""
    print(
        f"{'steps':>6s}    range   error  with outliers clipped, and exact: perplexity, divergence"
    )
    for num_steps in (0, 10, 50, 100, 150, 200):
        ranges = []
        line = f"{num_steps:6d}"
        for is_exact in (False, True):

            def way(name, w_OI, num_steps=num_steps, is_exact=is_exact, ranges=ranges):
                found = codes.Codes(*easyquant.easyquant_int4(w_OI, num_steps=num_steps))
                ranges.append(found.scale.mean() * 7)
                if is_exact:
                    return found
                sign = np.sign(found.value.astype(np.float32)).astype(np.int8)
                found.values.reshape(-1)[found.position] = 7 * sign
                return found._replace(position=None, value=None)

            _, error = trial.quantize(way)
            if not is_exact:
                line += f" {np.mean(ranges):8.4f}"
            figures = "  ".join(f"{ppl:9.4f} {kl:7.4f}" for ppl, kl in trial.measure())
            line += f"  {error:7.4f}  {figures}"
        print(line, flush=True)


def show_speed(folder):
    """Prints tokens a second."""
    for method in (None, "int8", "int8+head", "w8a8", "fp8", "int4", "easyquant"):
        model = hunyuan_jax.load(folder, dtype="float32", quantize=method).model
        print(f"{method or 'float32':10s} {speed(model):6.1f} tokens/s", flush=True)


def speed(model):
    """Tokens a second."""
    prompt = [i % (model.config.vocab_size - 1) for i in range(1000, 1064)]
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        model.generate([prompt], max_new_tokens=64, eos_token_id=())
        seconds.append(time.monotonic() - start)
    return 64 / min(seconds[1:])


def show_quantize(folder):
    """Prints how fast `quantize` is."""
    entries = open_model(folder).entries
    size = sum(2 * math.prod(entry.shape) for entry in entries) / 1e9
    for method in codes.METHODS:
        with tempfile.TemporaryDirectory() as parent:
            start = time.process_time()
            quantize_model(folder, pathlib.Path(parent, method), method)
            seconds = time.process_time() - start
        speed = size * os.cpu_count() / seconds
        print(f"{method:10s} {seconds:6.2f} CPU s  {speed:6.3f} GB/s", flush=True)


def show_choices(trial, choices):
    """Prints the table of what `--quantize` takes."""
    chips = _CHIPS if topology.has_compiler() else ()
    of_texts = ["perplexity", "KL"] * len(trial.rows)
    of_chips = [chip.partition(":")[0] for chip in chips]
    print_line("method", "bytes", *of_texts, "tokens/s", *of_chips)
    print_line(*["---"] * (3 + len(of_texts) + len(chips)))
    for choice in choices:
        print_line(
            choice,
            f"{_NUMBERS.get(choice) or stored_bytes(trial.opened, choice):.3f}",
            *figures_here(trial, choice),
            *(step_cycles(trial.opened.cfg, chip, choice) for chip in chips),
        )


def print_line(*cells):
    """A line of a table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def figures_here(trial, choice):
    """Perplexity and divergence of each text, and tokens a second; dashes where this device
    refuses.
    """
    dtype, method = (choice, None) if choice in _NUMBERS else ("float32", choice)
    try:
        trial.model = hunyuan_jax.load(trial.folder, dtype=dtype, quantize=method).model
    except ConfigError:
        return ["-"] * (2 * len(trial.rows) + 1)
    found = [x for ppl, kl in trial.measure() for x in (f"{ppl:.3f}", f"{kl:.4f}")]
    return [*found, f"{speed(trial.model):.1f}"]


def stored_bytes(opened, choice):
    """Bytes of an entry of the projections and experts in a file."""
    method = {"w8a8": "int8", "w8a8-fp8": "fp8"}.get(choice, choice)
    group, num_bytes, size = few_bits.group_of(opened.entries), 0, 0
    for entry in opened.entries:
        if few_bits.is_quantizable(entry):
            found = codes.quantize(entry.name, opened.tensor(entry), method, group)
            num_bytes, size = num_bytes + found.num_bytes, size + found.values.size
    return num_bytes / size


def step_cycles(cfg, chip, choice):
    """Thousands of static cycles of the products of one token; a dash if the chip refuses."""
    device = topology.topology_devices(chip)[0]
    try:
        few_bits.check_product(choice, device.device_kind, "quantize")
    except ConfigError:
        return "-"
    if choice == "float32":
        return "-"
    times, entries = collections.Counter(), names.entries(cfg)
    group = few_bits.group_of(entries)
    for entry in entries:
        is_head = entry.path == "lm_head/w_VD" or (
            entry.role == few_bits.Role.EMBEDDING and cfg.tie_embeddings
        )
        if is_head or few_bits.is_quantizable(entry):
            share = cfg.moe.top_k / cfg.moe.num_experts if ".experts." in entry.name else 1
            times[entry.shape, "bfloat16" if is_head else choice] += share
    found = (n * product_cycles(*shape, way, group, chip) for (shape, way), n in times.items())
    return round(sum(found) / 1000)


@functools.cache
def product_cycles(num_out, num_in, way, group, chip):
    """Static cycles of one row times a matrix."""
    sharding = jax.sharding.SingleDeviceSharding(topology.topology_devices(chip)[0])

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    w, multiply = abstract((num_in, num_out), jnp.bfloat16), lambda x, w: x @ w
    if way not in _NUMBERS:
        dtype = {"int4": "int4", "easyquant": "int4", "int8": "int8", "w8a8": "int8"}.get(way)
        num_groups, outliers = num_in // group if way == "int4" else 1, None
        if way == "easyquant":
            size = (1, math.ceil(_OUTLIERS * num_in * num_out))
            outliers = Outliers(abstract(size, "int32"), abstract(size, "bfloat16"))
        w = QuantArray(
            abstract((num_in, num_out), dtype or "float8_e4m3fn"),
            abstract((num_groups, num_out), "float32"),
            outliers,
            rounds_inputs=way.startswith("w8a8"),
        )
        multiply = product
    rows = abstract((2, num_in), jnp.bfloat16)  # one row is multiplied as two
    with tpu_compiler.without_cache():
        text = jax.jit(multiply).lower(rows, w).compile().as_text()
    return hlo.analyse(hlo_text.parse(text), {}).cycles


def show_cache(folder, texts, num_tokens):
    """Prints the table of what `--cache_dtype` takes."""
    lm = hunyuan_jax.load(folder, dtype="float32")
    rows = [rows_of(lm, text, num_tokens, num_tokens)[0].tolist() for text in texts]
    prompts = [rows[0][start : start + 32] for start in (0, 300, 600)]
    settings = Sampling(temperature=0, max_new_tokens=64, stop_ids=(), logprobs=0).resolved({})
    print_line("cache", "bytes a token", *["perplexity", "error"] * len(rows), "first other token")
    for cache_dtype in (None, "int8", "fp8"):
        engine = lm.model.new_engine(
            Limits(max_rows=4, max_context=num_tokens, cache_dtype=cache_dtype)
        )
        scored = score.of_ends(engine, rows, [1] * len(rows))
        logprobs = [np.array([entry.logprob for entry in row]) for row in scored]
        answers = [[] for _ in prompts]
        for output in engine.run([Request("", tuple(ids), settings) for ids in prompts]):
            answers[int(output.id)] += output.tokens
        if cache_dtype is None:
            truth, expected = logprobs, answers
        cells = []
        for now, before in zip(logprobs, truth, strict=True):
            error = np.abs(now - before)
            parts = (error.mean(), np.quantile(error, 0.99), error.max())
            cells += [f"{np.exp(-now.mean()):.3f}", ", ".join(f"{x:.4f}" for x in parts)]
        firsts = map(first_other, answers, expected)
        sizes = jax.eval_shape(functools.partial(empty_cache, lm.model.config, 1, 1, cache_dtype))
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sizes.entries))
        print_line(cache_dtype or "float32", size, *cells, ", ".join(firsts))


def first_other(answer, expected):
    """The number of the first token that is another."""
    pairs = enumerate(zip(answer, expected, strict=True), 1)
    return next((str(i) for i, (a, b) in pairs if a != b), "none")


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--row", type=int, default=512)
    tables = ("methods", "range", "choices", "cache", "speed", "quantize")
    parser.add_argument("--table", choices=tables, default="methods")
    parser.add_argument("--choices", default=",".join(_CHOICES))
    options = parser.parse_args()
    if options.table == "choices" and topology.has_compiler():
        topology.load_compiler()
    if options.table in ("speed", "quantize"):
        {"speed": show_speed, "quantize": show_quantize}[options.table](options.model)
    elif options.table == "cache":
        show_cache(options.model, options.texts, options.tokens)
    else:
        trial = Trial(options.model, options.texts, options.tokens, options.row)
        if options.table == "choices":
            show_choices(trial, options.choices.split(","))
        else:
            {"methods": show_methods, "range": show_range}[options.table](trial)


if __name__ == "__main__":
    main()
