"""What few bits cost: a model whose projections are quantised in several ways, against itself.

    python benchmarks/quantization.py MODEL TEXT... [--tokens=2048] [--row=512]
        [--table=methods|range|all]
    python benchmarks/quantization.py MODEL --table=speed

methods: one line a way, with the bytes of an entry, of each text (its first tokens, in rows) the
perplexity and the Kullback-Leibler divergence from the model in float32, in nats a token, the
relative error of the weights and the share of outliers: counterparts of EasyQuant's tables 1, 2, 4
and 7 (arXiv 2403.02775).
range: by step of its optimisation the range, and the perplexity with outliers clipped to it and
with exact ones: tables 5 and 9.
speed: tokens a second of a prompt of 64 tokens and 64 greedy ones, end to end.
all: of what `--quantize` takes the bytes, perplexity, divergence and speed, as the engine computes
them, and with libtpu the static cycles of a token's products on each chip (no attention, nothing
is run): thousands, by the compiler.
Figures: docs/results/quantization.md.
"""

import argparse
import collections
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

import hunyuan_jax
from hunyuan_jax.plan import hlo, hlo_text, topology
from hunyuan_jax.quant import codes, easyquant
from hunyuan_jax.quant.array import Outliers, QuantArray, product
from hunyuan_jax.weights import few_bits, names, reference
from hunyuan_jax.weights.open import open_model
from pallas_kernels import tpu_compiler

_NO_OUTLIERS = float("inf")
_CALIBRATION = "hunyuan_jax/weights/quantized.py"  # text for GPTQ


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
    damped_II = hessian_II + 0.01 * np.diag(hessian_II).mean() * np.eye(len(hessian_II))
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


def hessians(opened, ids):
    """Name of a matrix -> sums of products of its inputs [I, I] over a text."""
    hf = json.loads(opened.layout.texts["config.json"])
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


class Trial:
    """A model and rows of text, and what its matrices are replaced by."""

    def __init__(self, folder, texts, num_tokens, row):
        lm, self.opened = hunyuan_jax.load(folder, dtype="float32"), open_model(folder, "float32")
        self.folder, self.model, self.numbers = folder, lm.model, lm.model.params
        self.rows = [self._ids(lm, text, num_tokens, row) for text in texts]
        self.calibration = self._ids(lm, _CALIBRATION, 2048, row)
        self._truth = [[self._logprobs(row) for row in rows] for rows in self.rows]

    @staticmethod
    def _ids(lm, path, num_tokens, row):
        ids = lm.tokenizer.encode(pathlib.Path(path).read_text("utf-8"))[:num_tokens]
        return np.array(ids[: len(ids) // row * row]).reshape(-1, row)

    def _logprobs(self, row):
        logits_TV = np.array(self.model.logits(row[None])[0, :-1], np.float32)
        logits_TV -= logits_TV.max(-1, keepdims=True)
        logits_TV -= np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        return logits_TV

    def load(self, method):
        """Replaces the parameters by those of a method of `load`."""
        model = hunyuan_jax.load(self.folder, dtype="float32", quantize=method).model
        self.model.params = model.params

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
    trial.load("w8a8")
    line("w8a8", 1.006)
    trial.load(None)
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
    for _ in range(3):
        start = time.monotonic()
        model.generate([prompt], max_new_tokens=64, eos_token_id=())
        seconds.append(time.monotonic() - start)
    return 64 / min(seconds[1:])


def show_all(trial):
    """Prints the table of what `--quantize` takes."""
    chips = ("v5e:1x1", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1")
    chips = chips if topology.has_compiler() else ()
    print("| method | bytes |" + " perplexity | KL |" * len(trial.rows), end="")
    print(" tokens/s |" + "".join(f" {chip.partition(':')[0]} |" for chip in chips))
    print("|---" * (3 + 2 * len(trial.rows) + len(chips)) + "|")
    for method in ("float32", "bfloat16", "int8", "fp8", "int4", "easyquant", "w8a8"):
        is_number = method in ("float32", "bfloat16")
        dtype, quantize = (method, None) if is_number else ("float32", method)
        trial.model = hunyuan_jax.load(trial.folder, dtype=dtype, quantize=quantize).model
        figures = "".join(f" {ppl:.3f} | {kl:.4f} |" for ppl, kl in trial.measure())
        size = {"float32": 4.0, "bfloat16": 2.0}.get(method) or stored_bytes(trial.opened, method)
        print(f"| {method} | {size:.3f} |{figures} {speed(trial.model):.1f} |", end="", flush=True)
        for chip in chips:
            cycles = "" if method == "float32" else step_cycles(trial.opened.cfg, chip, method)
            print(f" {cycles} |", end="", flush=True)
        print()


def stored_bytes(opened, method):
    """Bytes of an entry of the projections and experts in a file."""
    method, group = {"w8a8": "int8"}.get(method, method), few_bits.group_of(opened.cfg)
    entries = [entry for entry in names.entries(opened.cfg) if few_bits.is_quantizable(entry)]
    found = [codes.quantize(e.name, opened.tensor(e), method, group) for e in entries]
    return sum(each.num_bytes for each in found) / sum(each.values.size for each in found)


def step_cycles(cfg, chip, method):
    """Thousands of static cycles of the products of one token."""
    sharding = jax.sharding.SingleDeviceSharding(topology.topology_devices(chip)[0])
    total, shapes = 0, collections.Counter()
    for entry in names.entries(cfg):
        is_head = entry.path == "lm_head/w_VD" or (
            entry.role == few_bits.Role.EMBEDDING and cfg.tie_embeddings
        )
        if is_head or few_bits.is_quantizable(entry):
            share = cfg.moe.top_k / cfg.moe.num_experts if ".experts." in entry.name else 1
            shapes[entry.shape, is_head] += share

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    for (shape, is_head), times in shapes.items():
        num_out, num_in = shape
        way = "bfloat16" if is_head else method
        w, multiply = abstract((num_in, num_out), jnp.bfloat16), lambda x, w: x @ w
        if way != "bfloat16":
            dtype = {"int8": "int8", "w8a8": "int8", "fp8": "float8_e4m3fn"}.get(way, "int4")
            groups = num_in // few_bits.group_of(cfg) if way == "int4" else 1
            values, scale = (
                abstract((num_in, num_out), dtype),
                abstract((groups, num_out), "float32"),
            )
            outliers, size = None, int(0.007 * num_in * num_out)
            if way == "easyquant":
                outliers = Outliers(abstract((1, size), "int32"), abstract((1, size), "bfloat16"))
            w = QuantArray(values, scale, outliers, rounds_inputs=way == "w8a8")
            multiply = product
        with tpu_compiler.without_cache():
            rows = abstract((2, num_in), jnp.bfloat16)  # one row is multiplied as two
            text = jax.jit(multiply).lower(rows, w).compile().as_text()
        total += times * hlo.analyse(hlo_text.parse(text), {}).cycles
    return round(total / 1000)


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--row", type=int, default=512)
    parser.add_argument("--table", choices=("methods", "range", "all", "speed"), default="methods")
    options = parser.parse_args()
    if options.table == "speed":
        show_speed(options.model)
        return
    trial = Trial(options.model, options.texts, options.tokens, options.row)
    shown = {"methods": show_methods, "range": show_range, "all": show_all}
    shown[options.table](trial)


if __name__ == "__main__":
    main()
