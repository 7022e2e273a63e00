"""What llama.cpp computes of a model's GGUF exports, beside this library on the files' numbers.

    pip install xllamacpp
    python benchmarks/llama_cpp.py MODEL TEXT [--kinds=f32,f16,q8_0,q4_0]

Two lines a kind: the file, and its numbers written as float32.  Each says how many of 64 greedy
tokens of llama.cpp are also ours until the first other one, for four prompts of 32 tokens of TEXT;
and of 8 positions of TEXT the divergence (KL) of our distribution from llama.cpp's in nats, mean
and largest.

Then one line for the first 1, 2, 4 and all layers of the file, with mean divergences from
llama.cpp: of what we compute with numbers; and of the same with the inputs of each product rounded
as llama.cpp does beside such a matrix: to eight bits in blocks of 32 beside Q8_0 and Q4_0 (ggml's
quantize_row_q8_0), to float16 beside F16.  The third is that of the rounded computation from
itself after noise of 1e-7 on the embeddings: a code that falls to the other side moves the inputs
of the next products by much more, so that two engines which round agree no better than this.
Figures: docs/results/quantization.md.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
import xllamacpp

from hunyuan_jax.gguf import container
from hunyuan_jax.storage import Place
from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.weights import names, reference
from hunyuan_jax.weights.gguf_export import export_gguf
from hunyuan_jax.weights.open import open_model

_PROMPTS, _PROMPT, _ANSWER = 4, 32, 64
_POSITIONS = 8
_LAYERS = (1, 2, 4)
_NOISE = 1e-7


class LlamaCpp:
    """One file in llama.cpp: one thread, a float32 cache."""

    def __init__(self, path, num_ids):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), 256, 1
        params.n_gpu_layers, params.warmup, params.fit_params, params.verbosity = 0, 0, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        flash = xllamacpp.llama_flash_attn_type
        params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server, self._num_ids = xllamacpp.Server(params), num_ids

    def answer(self, ids, banned):
        """Greedy ids."""
        request = {"prompt": ids, "n_predict": _ANSWER, "logprobs": 1, "ignore_eos": True}
        request |= {"logit_bias": [[i, False] for i in banned], "temperature": 0}
        found = self._server.handle_completions(request)
        return [token["id"] for token in found["choices"][0]["logprobs"]["content"]]

    def logprobs(self, ids):
        """Of the next token, [V]; normalised, since llama.cpp adds up in float32."""
        request = {"prompt": ids, "n_predict": 1, "logprobs": self._num_ids, "temperature": 0}
        found = self._server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        made_V = np.full(self._num_ids, -np.inf)
        for token in found[0]["top_logprobs"]:
            made_V[token["id"]] = token["logprob"]
        return made_V - np.log(np.exp(made_V).sum())


class Rounding:
    """A matrix whose products round what they multiply."""

    __array_ufunc__ = None  # so that `array @ it` is asked of it

    def __init__(self, w_OI, rounded):
        self._w_OI, self._rounded, self.shape = w_OI, rounded, w_OI.shape

    @property
    def T(self):
        """Itself: what multiplies it transposes it."""
        return self

    def __getitem__(self, ids):
        return self._w_OI[ids]

    def __rmatmul__(self, x_TI):
        return self._rounded(x_TI) @ self._w_OI.T


def rounded_f16(x_TI):
    """To float16."""
    return x_TI.astype(np.float16).astype(np.float32)


def rounded_q8_0(x_TI):
    """To eight bits in blocks of 32, whose scale is float16."""
    blocks = x_TI.reshape(len(x_TI), -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    scale = rounded_f16(largest / np.float32(127))
    return (np.rint(blocks * inverse) * scale).reshape(x_TI.shape)


ROUNDED = {"f32": None, "f16": rounded_f16, "q8_0": rounded_q8_0, "q4_0": rounded_q8_0}


class Numbers:
    """The numbers of a file, as weights/reference.py computes with them."""

    def __init__(self, path):
        model = open_model(path, "float32")
        self._hf = json.loads(model.layout.texts["config.json"])
        self._tensors = {e.name: np.asarray(model.tensor(e), np.float32) for e in model.entries}
        self._routers = {entry.name for entry in model.entries if names.is_router(entry)}

    def logprobs(self, ids, rounded=None, noise=0.0):
        """Of the token after each, [T, V]; noise is relative and on the embeddings."""

        def read(name):
            tensor = self._tensors[name]
            is_product = rounded is not None and tensor.ndim == 2 and name not in self._routers
            return Rounding(tensor, rounded) if is_product else tensor

        x_TD, kv = reference.embed(read, np.array(ids)), None
        x_TD *= 1 + noise * np.random.default_rng(0).standard_normal(x_TD.shape, np.float32)
        for index in range(self._hf["num_hidden_layers"]):
            x_TD, kv = reference.layer(self._hf, read, index, x_TD, kv)
        logits_TV = reference.logits(self._hf, read, x_TD).astype(np.float64)
        logits_TV -= logits_TV.max(-1, keepdims=True)
        return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


def first_layers(file, output, num_layers):
    """Writes a GGUF file with the first layers of another."""
    header = container.read_header(Place(file))
    later = tuple(f"blk.{i}." for i in range(num_layers, num_layers_of(header)))
    kept = [t for t in header.tensors.values() if not t.name.startswith(later)]
    fields = header.fields | {_layers_field(header): num_layers}
    with open(file, "rb") as source, open(output, "wb") as target:
        target.write(container.header(fields, [(t.name, t.kind, t.shape) for t in kept]))
        for tensor in kept:
            source.seek(tensor.start)
            target.write(source.read(tensor.num_bytes) + container.padding(tensor.num_bytes))


def num_layers_of(header):
    """Number of layers of a GGUF file."""
    return header.fields[_layers_field(header)]


def _layers_field(header):
    return f"{header.fields['general.architecture']}.block_count"


def num_same(numbers, answers, banned):
    """Of each answer, tokens until the first that we would not draw."""
    found = []
    for prompt, answer in answers:
        ours_TV = numbers.logprobs(prompt + answer)[len(prompt) - 1 : -1]
        ours_TV[:, banned] = -np.inf
        is_other_T = ours_TV.argmax(-1) != answer
        found.append(int(is_other_T.argmax()) if is_other_T.any() else len(answer))
    return found


def divergence(ours_TV, theirs_TV):
    """Of each position, in nats."""
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.exp(theirs_TV) * (theirs_TV - ours_TV)).sum(-1)


class Trial:
    """A text, and what is asked about its model's files."""

    def __init__(self, folder, text):
        tokenizer, self.num_ids = load_tokenizer(folder), open_model(folder).cfg.vocab_size
        ids = tokenizer.encode(text)
        self.prompts = [ids[400 * i : 400 * i + _PROMPT] for i in range(_PROMPTS)]
        self.ids = ids[: _PROMPT + _POSITIONS]
        # An answer lists only tokens that end a character; ends would end it.
        ends = [tokenizer.eos_id, *tokenizer.stop_ids]
        self.banned = [
            i for i in range(self.num_ids) if i in ends or not tokenizer.decode([i]).isascii()
        ]

    def theirs(self, llama):
        """Log-probabilities by llama.cpp, [positions, V]."""
        return np.array([llama.logprobs(self.ids[:t]) for t in range(_PROMPT, len(self.ids))])

    def ours(self, numbers, *how):
        """The same by us."""
        return numbers.logprobs(self.ids, *how)[_PROMPT - 1 : -1]

    def show_file(self, name, path):
        """Prints the line of a file."""
        llama, numbers = LlamaCpp(path, self.num_ids), Numbers(path)
        answers = [(prompt, llama.answer(prompt, self.banned)) for prompt in self.prompts]
        same = ", ".join(map(str, num_same(numbers, answers, self.banned)))
        found = divergence(self.ours(numbers), self.theirs(llama))
        size = path.stat().st_size / 1e9
        print(
            f"{name:24s} {size:6.3f} GB  the same tokens {same:14s}  "
            f"KL {found.mean():.2e}, {found.max():.2e}",
            flush=True,
        )

    def show_layers(self, num_layers, path, rounded):
        """Prints the line of a file with some layers."""
        theirs_TV = self.theirs(LlamaCpp(path, self.num_ids))
        numbers = Numbers(path)
        rounded_TV = self.ours(numbers, rounded)
        print(
            f"  layers: {num_layers:3d}   KL with numbers {kl(self.ours(numbers), theirs_TV)}, "
            f"rounded {kl(rounded_TV, theirs_TV)}, of the rounded from itself after noise "
            f"{kl(self.ours(numbers, rounded, _NOISE), rounded_TV)}",
            flush=True,
        )


def kl(ours_TV, theirs_TV):
    """The mean divergence, to be read."""
    return f"{divergence(ours_TV, theirs_TV).mean():.1e}"


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--kinds", default=",".join(ROUNDED))
    options = parser.parse_args()
    trial = Trial(options.model, options.text.read_text("utf-8"))
    for kind in options.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, f"{kind}.gguf")
            export_gguf(options.model, path, kind)
            trial.show_file(kind, path)
            if ROUNDED[kind] is None:
                continue
            numbers = pathlib.Path(folder, "numbers.gguf")
            export_gguf(path, numbers, "f32")
            trial.show_file(f"numbers of {kind}, as f32", numbers)
            numbers.unlink()
            num_all = num_layers_of(container.read_header(Place(path)))
            for num_layers in (n for n in _LAYERS if n < num_all):
                first = pathlib.Path(folder, f"first_{num_layers}.gguf")
                first_layers(path, first, num_layers)
                trial.show_layers(num_layers, first, ROUNDED[kind])
            trial.show_layers(num_all, path, ROUNDED[kind])


if __name__ == "__main__":
    main()
