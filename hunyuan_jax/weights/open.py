"""What model is at a path: a run, a converted checkpoint or an official folder."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.quant.codes import Codes
from hunyuan_jax.storage import Place
from hunyuan_jax.weights import folder as official
from hunyuan_jax.weights import names, stream, write
from hunyuan_jax.weights.gguf_file import model_place

_EXPORTING = "export.json"


class Model(Protocol):
    """A model in files, of which nothing but headers has been read.

    cfg: with the dtype in which it is read; entries: its official tensors; place: where its
    other files lie; tokenizer: what `load_tokenizer` takes; layout: in which it is written as an
    official folder, None if it never was one; others: names of the files in `place` that are
    copied with it; fingerprint: tells models apart; is_quantized: whether some of
    its tensors have codes.
    """

    cfg: ModelConfig
    entries: Sequence[names.Entry]
    place: Place
    tokenizer: Place | str
    layout: write.Layout | None
    others: Sequence[str]
    fingerprint: str
    is_quantized: bool

    def read(self, shardings: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters, a nested dict of arrays on the devices of `shardings`.

        `shardings` is a nested dict with a NamedSharding for each.
        """

    def tensor(self, entry: names.Entry) -> np.ndarray:
        """One tensor in the official layout."""

    def codes(self, entry: names.Entry) -> Codes | None:
        """The codes of a tensor that the model holds in few bits, else None."""


def open_model(path: str | os.PathLike, dtype: str | None = None) -> Model:
    """The model at a path.

    Args:
      path: the workdir of a run, the --output of an import, a folder with config.json and
        *.safetensors or pytorch_model*.bin, a GGUF file, or the hub id of one (`hub.hub_id`).
      dtype: "float32" or "bfloat16" for parameters and activations; None keeps what the path says.
        The router is float32 always.

    Raises:
      ConfigError: none of them, or one that is damaged or not finished.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"dtype = {dtype!r}; use 'float32', 'bfloat16' or None.")
    place = model_place(path)
    if place.is_local and os.path.isdir(place.path("checkpoints")):
        from hunyuan_jax.weights.run import Run  # with orbax, which takes a second to import

        return Run(place, dtype)
    return (Converted if place.is_file(stream.ABOUT) else Official)(place, dtype)


class Official:
    """An official folder, as a `Model`."""

    def __init__(self, place: Place, dtype: str | None):
        self._folder = official.OfficialFolder(place)
        self._plan = official.plan(self._folder, dtype)
        self.cfg, self.place = official.with_stop_ids(self._plan.cfg, place), place
        self.tokenizer, self.entries = place, list(self._plan.pieces)
        self.layout = write.layout_of(self._folder, self._plan)
        self.others = self._folder.others
        self.is_quantized = any(piece.parts for piece in self._plan.pieces.values())

    @property
    def fingerprint(self) -> str:
        """See `Model`."""
        return self._folder.fingerprint

    def read(self, shardings: dict[str, Any]) -> dict[str, Any]:
        """See `Model.read`."""
        return official.read_params(self._folder, self._plan, shardings)

    def tensor(self, entry: names.Entry) -> np.ndarray:
        """See `Model.tensor`."""
        dtype = names.dtype_of(entry, self.cfg.dtype)
        return self._folder.read(self._plan.pieces[entry], dtype)

    def codes(self, entry: names.Entry) -> Codes | None:
        """See `Model.codes`."""
        return self._folder.codes(self._plan.pieces[entry])


class Converted:
    """A checkpoint of `convert_torch.py import`, as a `Model`."""

    is_quantized = False

    def __init__(self, place: Place, dtype: str | None):
        self._converted = stream.open_converted(place)
        cfg = self._converted.cfg
        self.cfg = official.with_stop_ids(
            dataclasses.replace(cfg, dtype=dtype or cfg.dtype), place
        )
        self.place, self.tokenizer, self.entries = place, place, self._converted.entries
        self.layout = stream.layout_of(self._converted, self.cfg)
        self.others = self._converted.about["copied"]
        self.fingerprint = self._converted.about["fingerprint"]

    def read(self, shardings: dict[str, Any]) -> dict[str, Any]:
        """See `Model.read`."""
        return stream.read_params(self._converted, self.cfg.dtype, shardings)

    def tensor(self, entry: names.Entry) -> np.ndarray:
        """See `Model.tensor`."""
        return stream.read_tensor(self._converted, entry)

    def codes(self, entry: names.Entry) -> None:
        """A converted checkpoint holds numbers."""
        del entry


def export_model(checkpoint: str | os.PathLike, output: str | os.PathLike) -> int:
    """Writes a model as an official folder, byte for byte that of its source if it was safetensors
    of the same dtype.

    The same call again continues one that was killed.  Returns how many files of weights this call
    wrote.

    Raises:
      ConfigError: no such model, an output that holds something else, a full disk.
    """
    model, target = open_model(checkpoint), Place(output, "--output")
    layout = model.layout or write.new_layout(model.cfg)
    copied = {name: model.place.read(name) for name in model.others}
    layout = layout._replace(texts=copied | layout.texts)
    claim = {"fingerprint": model.fingerprint, "dtype": model.cfg.dtype}
    found = write.check_claim(target, _EXPORTING, claim, "export of another checkpoint")
    written = found.keys() & layout.headers.keys()  # what has its name is whole
    target.check_space(sum(layout.num_bytes(file) for file in layout.headers.keys() - written))
    target.write(_EXPORTING, [write.as_json(claim)])
    num_written = write.write_folder(target, layout, model.cfg, model.tensor, written)
    target.remove(_EXPORTING)
    return num_written
