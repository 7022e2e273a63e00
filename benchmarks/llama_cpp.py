"""What llama.cpp computes of a model's GGUF exports, beside this library on the files' numbers.

    pip install xllamacpp
    python benchmarks/llama_cpp.py MODEL TEXT [--kinds=f32,f16,q8_0,q4_0]

One line a kind: how many of 64 greedy tokens of llama.cpp are also ours, for four prompts of 32
tokens of TEXT, in order until the first other one; and of 16 positions of TEXT the divergence
(KL) of our distribution from llama.cpp's in nats, mean and largest, and the largest difference of
a log-probability among its ten likeliest tokens.  Then all of it once more with the inputs of each
product rounded as llama.cpp does beside such a matrix: to eight bits in blocks of 32 beside Q8_0
and Q4_0 (ggml's quantize_row_q8_0), to float16 beside F16.
Figures: docs/results/quantization.md.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
import xllamacpp

from hunyuan_jax.tokenizer import load_tokenizer
from hunyuan_jax.weights import names, reference
from hunyuan_jax.weights.gguf_export import export_gguf
from hunyuan_jax.weights.open import open_model

_PROMPTS, _PROMPT, _ANSWER = 4, 32, 64
_POSITIONS = 16


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
        """Of the next token, [V]."""
        request = {"prompt": ids, "n_predict": 1, "logprobs": self._num_ids, "temperature": 0}
        found = self._server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        made_V = np.full(self._num_ids, -np.inf)
        for token in found[0]["top_logprobs"]:
            made_V[token["id"]] = token["logprob"]
        return made_V


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
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    return (np.rint(blocks * inverse) * rounded_f16(scale)).reshape(x_TI.shape)


ROUNDED = {"f32": None, "f16": rounded_f16, "q8_0": rounded_q8_0, "q4_0": rounded_q8_0}


def logprobs_of(path, rounded=None):
    """ids [T] -> log-probabilities [T, V] of a file's numbers, by weights/reference.py."""
    model = open_model(path, "float32")
    hf = json.loads(model.layout.texts["config.json"])
    tensors = {}
    for entry in names.entries(model.cfg):
        tensor = np.asarray(model.tensor(entry), np.float32)
        is_product = rounded is not None and tensor.ndim == 2
        tensors[entry.name] = Rounding(tensor, rounded) if is_product else tensor

    def run(ids):
        x_TD, kv = reference.embed(tensors.__getitem__, np.array(ids)), None
        for index in range(hf["num_hidden_layers"]):
            x_TD, kv = reference.layer(hf, tensors.__getitem__, index, x_TD, kv)
        logits_TV = reference.logits(hf, tensors.__getitem__, x_TD).astype(np.float64)
        logits_TV -= logits_TV.max(-1, keepdims=True)
        return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))

    return run


def num_same(run, answers, banned):
    """Of each answer, tokens until the first that we would not draw."""
    found = []
    for prompt, answer in answers:
        ours_TV = run(prompt + answer)[len(prompt) - 1 : -1]
        ours_TV[:, banned] = -np.inf
        is_other_T = ours_TV.argmax(-1) != answer
        found.append(int(is_other_T.argmax()) if is_other_T.any() else len(answer))
    return found


def differences(ours_TV, theirs_TV):
    """(mean and largest divergence, largest difference among the ten likeliest)."""
    with np.errstate(invalid="ignore"):
        gap_TV = np.nan_to_num(np.exp(theirs_TV) * (theirs_TV - ours_TV))
    divergence_T = gap_TV.sum(-1)
    first_T10 = np.argsort(-theirs_TV, axis=-1)[:, :10]
    gap = np.abs(np.take_along_axis(theirs_TV - ours_TV, first_T10, -1)).max()
    return divergence_T.mean(), divergence_T.max(), gap


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--kinds", default=",".join(ROUNDED))
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    ids = tokenizer.encode(options.text.read_text("utf-8"))[: _PROMPTS * 400]
    prompts = [ids[400 * i : 400 * i + _PROMPT] for i in range(_PROMPTS)]
    # An answer lists only tokens that end a character; ends would end it.
    ends = [tokenizer.eos_id, *tokenizer.stop_ids]
    for kind in options.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, f"{kind}.gguf")
            size = export_gguf(options.model, path, kind) / 1e9
            num_ids = open_model(path).cfg.vocab_size
            banned = [
                i for i in range(num_ids) if i in ends or not tokenizer.decode([i]).isascii()
            ]
            llama = LlamaCpp(path, num_ids)
            answers = [(prompt, llama.answer(prompt, banned)) for prompt in prompts]
            text = ids[: _PROMPT + _POSITIONS]
            theirs_TV = np.array([llama.logprobs(text[:t]) for t in range(_PROMPT, len(text))])
            for rounded in dict.fromkeys((None, ROUNDED[kind])):
                run = logprobs_of(path, rounded)
                same = ", ".join(map(str, num_same(run, answers, banned)))
                mean, most, gap = differences(run(text)[_PROMPT - 1 : -1], theirs_TV)
                name = f"{kind}{', rounded' * (rounded is not None)}"
                print(
                    f"{name:14s} {size:6.3f} GB  {same:16s}  KL {mean:.6f} {most:.6f}  "
                    f"largest {gap:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
