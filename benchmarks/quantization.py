"""What few bits cost: perplexity of a model whose projections are quantised in several ways.

    python benchmarks/quantization.py MODEL TEXT... [--tokens=2048]

Prints one line a way, with the perplexity of each text (its first tokens, in rows of 512), the
relative error of the weights and the share of outliers.  Counterparts of EasyQuant's tables 1, 4,
7 and 9 (docs/quantization.md).
"""

import collections
import sys

import numpy as np

import hunyuan_jax
from hunyuan_jax.quant import codes, easyquant
from hunyuan_jax.weights import few_bits, names
from hunyuan_jax.weights.open import open_model

_ROW = 512
_NO_OUTLIERS = float("inf")


def ways(group):
    """Name -> (matrix -> Codes)."""

    def easy(num_sigma, num_steps):
        return lambda w: codes.Codes(*easyquant.easyquant_int4(w, num_sigma, num_steps))

    return {
        "int8, channel": lambda w: codes.int8(w, group),
        "fp8, channel": lambda w: codes.fp8(w, group),
        f"int4, groups of {group}": lambda w: codes.int4(w, group),
        "int4 RTN, channel": easy(_NO_OUTLIERS, 0),
        "optimise only": easy(_NO_OUTLIERS, 100),
        "isolate only, n = 3": easy(3.0, 0),
        "EasyQuant, n = 3": easy(3.0, 100),
        "EasyQuant, n = 2.5": easy(2.5, 100),
        "isolate only, n = 2": easy(2.0, 0),
        "isolate only, n = 4": easy(4.0, 0),
        "isolate only, n = 6": easy(6.0, 0),
    }


def quantized(opened, params, way, shares):
    """Parameters with every projection quantised and made numbers again; (them, relative error).

    shares: collects the outliers' share by the kind of matrix.
    """
    error = total = 0.0
    made = {path: np.array(leaf) for path, leaf in flat(params)}
    for entry in names.entries(opened.cfg):
        if few_bits.is_quantizable(entry):
            w_OI = np.asarray(opened.tensor(entry), np.float32)
            found = way(w_OI)
            dense_OI = codes.dequantized(found)
            error += float(((dense_OI - w_OI) ** 2).sum())
            total += float((w_OI**2).sum())
            if found.position is not None:
                kind = entry.name.split(".")[-2]
                shares[kind].append(len(found.position) / w_OI.size)
            ours = names.to_ours(dense_OI, entry, entry.our_shape)
            made[entry.path][entry.index] = ours
    return nested(made), (error / total) ** 0.5


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


def main(arguments):
    """Measures and prints."""
    options = [a for a in arguments if a.startswith("--tokens=")]
    folder, *texts = [a for a in arguments if a not in options]
    num_tokens = int(options[0].split("=")[1]) if options else 2048
    lm, opened = hunyuan_jax.load(folder, dtype="float32"), open_model(folder, "float32")
    rows = []
    for text in texts:
        with open(text, encoding="utf-8") as file:
            ids = lm.tokenizer.encode(file.read())[:num_tokens]
        rows.append(np.array(ids[: len(ids) // _ROW * _ROW]).reshape(-1, _ROW))
    model, numbers = lm.model, lm.model.params

    def line(name, params, error=0.0, share=0.0):
        model.params = params
        found = [np.exp(np.mean([model.loss(row[None], row[None]) for row in of])) for of in rows]
        perplexities = "  ".join(f"{value:9.4f}" for value in found)
        print(f"{name:24s} {perplexities}  {error:7.4f}  {100 * share:6.3f} %", flush=True)

    print(f"{'':24s} {'  '.join(f'{len(of) * _ROW:5d} tok' for of in rows)}    error  outliers")
    line("numbers", numbers)
    for name, way in ways(few_bits.group_of(opened.cfg)).items():
        shares = collections.defaultdict(list)
        params, error = quantized(opened, numbers, way, shares)
        share = np.mean([s for of in shares.values() for s in of]) if shares else 0.0
        line(name, params, error, share)
        if name == "EasyQuant, n = 3":
            kinds = "  ".join(f"{kind} {100 * np.mean(of):.3f} %" for kind, of in shares.items())
            print(f"  outliers by kind: {kinds}")


if __name__ == "__main__":
    main(sys.argv[1:])
