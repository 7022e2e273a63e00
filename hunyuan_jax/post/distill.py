"""Distillation: a student learns what a larger model, its teacher, says about each token.

The teacher runs inside the train step on the same micro-batch.  Its parameters are constants of
the step: they have no gradient and no optimizer state, and no checkpoint holds them.

Letters: B batch, T tokens, S tokens of the same row, L the student's layers, D and E widths of
student and teacher, V vocabulary, k of the teacher's most probable tokens, c tokens of a chunk.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hunyuan_jax.checkpoint import manifest
from hunyuan_jax.config import Config, DistillConfig, LoraConfig, ModelConfig, to_dict
from hunyuan_jax.data.stream import DataStream
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.files import write_whole
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.model.transformer import Output, Transformer
from hunyuan_jax.parallel import context, hosts, rules
from hunyuan_jax.parallel.xla_workarounds import MAX_LOGITS_BYTES
from hunyuan_jax.params import abstract
from hunyuan_jax.params.tree import join, path_of
from hunyuan_jax.post import inherit, masks
from hunyuan_jax.post.sft import open_chats
from hunyuan_jax.tokenizer import Tokenizer, load_tokenizer
from hunyuan_jax.train.objective import BatchSpec, LossMetrics, Totals
from hunyuan_jax.train.pretrain import Pretrain
from hunyuan_jax.train.start import model_at, weights_at
from hunyuan_jax.train.state import Program
from hunyuan_jax.train.step import feed
from hunyuan_jax.weights.open import Model

_AFFINITY_TEMPERATURE = 0.1  # of the cosines between the hidden states of two tokens
_NUM_BATCHES = 16  # that say which weights matter
_TEACHER = "config.objective.distill.teacher"
_RIDGE = 1e-4  # of the fit between hidden states, relative to their mean square


class Distill(Pretrain):
    """The objective of distillation; the loss is a mean over the tokens that the data teaches.

    A batch has the teacher's parameters beside the fields of pre-training.
    """

    name = "distill"

    def __init__(self, config: Config):
        super().__init__(config)
        cfg, model = config.objective.distill, config.model
        if not cfg.teacher:
            raise ConfigError(
                f"{_TEACHER} is empty; set it to a model folder, its hub id, "
                "or the workdir of a run."
            )
        self._program: Program | None = None
        self._stream: DataStream | None = None
        self._masks: inherit.Units = {}
        theirs, self._tokenizer = model_at(cfg.teacher, _TEACHER)
        self._teacher = _as_teacher(theirs, model)
        if model.vocab_size != self._teacher.vocab_size:
            raise ConfigError(
                f"{_TEACHER} = {cfg.teacher!r} has a vocabulary of "
                f"{self._teacher.vocab_size}, the student one of config.model.vocab_size = "
                f"{model.vocab_size}; both must share it. Take another teacher."
            )
        if config.train.seq_len > self._teacher.max_position:
            raise ConfigError(
                f"config.train.seq_len = {config.train.seq_len} is above the "
                f"{self._teacher.max_position} positions of {_TEACHER} = "
                f"{cfg.teacher!r}; set it to at most that."
            )
        if self._inherits:
            path, name = self._origin
            inherit.require_fits(path, model_at(path, name)[0], model, cfg, name)
        self._require_layers()
        self._inner_layers = self._matched_layers()

    def _require_layers(self) -> None:
        layers, ours = self.config.objective.distill.inner_layers, self.config.model.num_layers
        theirs = self._teacher.num_layers
        if layers and (len(layers) != ours or layers[-1] >= theirs):
            raise ConfigError(
                f"config.objective.distill.inner_layers = {layers} must name one of the teacher's "
                f"{theirs} layers, counted from 0, for each of the student's {ours}; leave it "
                "empty to match those that it inherits."
            )

    def _matched_layers(self) -> np.ndarray:
        """The teacher's layer that each of the student's is matched with, int [L]."""
        cfg, ours = self.config.objective.distill, self.config.model
        if cfg.inner_layers:
            return np.array(cfg.inner_layers)
        if self._inherits and self._origin[0] == cfg.teacher:
            return inherit.kept_layers(self._teacher, ours, cfg, self._masks)
        depths = np.arange(1, ours.num_layers + 1) / ours.num_layers
        return np.maximum(np.round(depths * self._teacher.num_layers).astype(int) - 1, 0)

    @property
    def _inherits(self) -> bool:
        return self.config.objective.distill.inherit != "none" and not self.config.train.init_from

    @property
    def _origin(self) -> tuple[str, str]:
        """(the model that the student inherits from, the field that names it)."""
        cfg = self.config.objective.distill
        name = "inherit_from" if cfg.inherit_from else "teacher"
        return getattr(cfg, name), f"config.objective.distill.{name}"

    @property
    def eval_spec(self) -> BatchSpec:
        """Those of pre-training; chats do not count bytes."""
        is_text = self.config.objective.distill.rows == "text"
        return super().eval_spec if is_text else self.batch_spec

    def open_stream(self, tokenizer: Tokenizer) -> DataStream:
        """Opens the text or the chats of config.data."""
        cfg = self.config.objective.distill
        try:
            theirs = load_tokenizer(self._tokenizer)
        except ConfigError:  # a folder without one
            theirs = tokenizer
        if theirs.fingerprint() != tokenizer.fingerprint():
            raise ConfigError(
                f"{_TEACHER} = {cfg.teacher!r} has another tokenizer than "
                f"config.data.tokenizer = {self.config.data.tokenizer!r}; take a teacher with the "
                "student's."
            )
        if cfg.rows == "chats":
            self._stream = open_chats(self.config, tokenizer)
        else:
            self._stream = super().open_stream(tokenizer)
        return self._stream

    def prepare(
        self, program: Program, workdir: str, initial_params: Callable[[], dict[str, Any]]
    ) -> None:
        """Refuses a teacher whose weights are not those that the run has begun with; learns the
        masks that say what the student inherits, or reads those of an earlier start of the run.
        """
        self._program = program
        with hosts.fail_together():
            if hosts.is_first():
                self._require_same_teacher(Path(workdir, "teacher.txt"))
        if self._inherits and self.config.objective.distill.inherit == "mask":
            self._masks = self._stored_masks(Path(workdir, f"masks-{self._mask_key()}.npz"))
            self._inner_layers = self._matched_layers()

    def _require_same_teacher(self, file: Path) -> None:
        now, before = self._weights().fingerprint, None
        if file.is_file():
            before = file.read_text().strip()
        if before not in (None, now):
            raise ConfigError(
                f"{_TEACHER} = {self.config.objective.distill.teacher!r} "
                f"holds other weights than the run of {file.parent} has begun with: they were "
                f"{before}, now {now}. Restore them, or use another --workdir."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, f"{now}\n".encode())

    def _weights(self) -> Model:
        return weights_at(self.config.objective.distill.teacher, self._teacher.dtype, _TEACHER)

    def initial_weights(self, mesh: Mesh) -> dict[str, Any]:
        """Returns the parameters that the student inherits."""
        if not self._inherits:
            return {}
        cfg, ours = self.config.objective.distill, self._student(mesh)
        larger, theirs, params = self._larger(mesh)
        importance = self._importance(larger, params) if cfg.inherit == "fisher" else None

        def cut(params, importance, learned):
            units = inherit.scores(params if importance is None else importance, theirs)
            return inherit.inherit(params, join(units, learned), theirs, ours, cfg)

        return jax.jit(cut, out_shardings=abstract.shardings(ours))(
            params, importance, self._masks
        )

    def _student(self, mesh: Mesh) -> dict[str, Any]:
        """The `ParamSpec`s of the student, without adapters."""
        return abstract_model(dataclasses.replace(self.config.model, lora=LoraConfig()), mesh)[1]

    def _larger(self, mesh: Mesh) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
        """(the model that the student inherits from, its `ParamSpec`s, its parameters)."""
        path, name = self._origin
        opened = weights_at(path, "float32", name)
        specs = abstract_model(opened.cfg, mesh)[1]
        return opened.cfg, specs, opened.read(abstract.shardings(specs))

    def _mask_key(self) -> str:
        """A hash of what masks are learned from."""
        path, name = self._origin
        weights = [self._weights().fingerprint, weights_at(path, "float32", name).fingerprint]
        fixed = manifest.fixed_fields(to_dict(self.config))
        text = json.dumps([weights, fixed, self._stream.identity()], default=str)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def _stored_masks(self, file: Path) -> inherit.Units:
        mesh = self._program.mesh
        theirs = abstract_model(model_at(*self._origin)[0], mesh)[1]
        rows = masks.rows_of(theirs, self._student(mesh), self.config.objective.distill)
        if not rows:
            return {}
        if not hosts.broadcast_from_first(file.is_file()):
            learned = jax.device_get(self._learned_masks(rows))
            if hosts.is_first():
                data = io.BytesIO()
                leaves = jax.tree.leaves_with_path(learned)
                np.savez(data, **{path_of(path): leaf for path, leaf in leaves})
                write_whole(file, data.getvalue())
            return learned
        with hosts.fail_together(), np.load(file) as found:
            return jax.tree.map_with_path(lambda path, _: found[path_of(path)], rows)

    def _learned_masks(self, rows: dict[str, Any]) -> inherit.Units:
        """Learns masks over the first batches; the larger model's weights stay as they are."""
        cfg, program, stream = self.config.objective.distill, self._program, self._stream
        larger, specs, params = self._larger(program.mesh)
        graph_def, fixed = self._graph_def(larger), masks.fixed(specs, cfg)

        def loss(found, inputs):
            batch, found = inputs["batch"], join(fixed, found)
            model = nnx.merge(graph_def, masks.masked(inputs["params"], specs, found))
            return self._token_loss(self._figures(model, batch)[2], batch, self.totals(batch))[0]

        own_rows, to_devices = feed(program)
        shared = self.read_constants(program.mesh)
        inputs = (
            {"params": params, "batch": to_devices(stream.batch(step, own_rows)) | shared}
            for step in range(cfg.mask_steps)
        )
        key = jax.random.key(self.config.train.seed)
        return masks.learn(loss, rows, inputs, cfg.mask_steps, key)

    def _graph_def(self, larger: ModelConfig) -> nnx.GraphDef:
        """A larger model as it runs to say which of its units matter."""
        cfg = dataclasses.replace(_as_teacher(larger, self.config.model), remat="full")
        return abstract_model(cfg, self._program.mesh)[0]

    def _importance(self, cfg: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
        """Returns the effect of each parameter of a larger model on its loss: the root of the
        summed squares of weight times gradient, over the first batches.
        """
        program, stream, graph_def = self._program, self._stream, self._graph_def(cfg)
        specs = abstract_model(cfg, program.mesh)[1]

        def loss(params, batch):
            model: Transformer = nnx.merge(graph_def, params)
            output = model(batch["tokens"], batch["positions"], batch["segment_ids"])
            loss_BT = model.token_losses(output.hidden_BTD, batch["targets"])
            return (loss_BT * batch["loss_weights"]).sum() / self.totals(batch)["targets"]

        @functools.partial(jax.jit, donate_argnums=0, out_shardings=abstract.shardings(specs))
        def add(squares, params, batch):
            grads = jax.grad(loss)(params, batch)
            return jax.tree.map(lambda a, w, dw: a + jnp.square(w * dw), squares, params, grads)

        rows, to_devices = feed(program)
        squares = jax.tree.map(jnp.zeros_like, params)
        for step in range(_NUM_BATCHES):
            squares = add(squares, params, to_devices(stream.batch(step, rows)))
        return jax.tree.map(jnp.sqrt, squares)

    def constants(self, mesh: Mesh) -> dict[str, Any]:
        """Returns the shapes of the teacher's parameters, in the dtypes in which they are used."""
        context.refuse(mesh, "config.objective.name = 'distill'")
        specs = abstract_model(self._teacher, mesh)[1]
        dtype = self._teacher.dtype
        return {"teacher": jax.tree.map(lambda spec: spec.struct(spec.dtype_in_use(dtype)), specs)}

    def read_constants(self, mesh: Mesh) -> dict[str, Any]:
        """Reads the teacher's parameters."""
        shapes = self.constants(mesh)["teacher"]
        params = self._weights().read(jax.tree.map(lambda a: a.sharding, shapes))
        return {"teacher": jax.tree.map(lambda a, b: a.astype(b.dtype), params, shapes)}

    def loss(
        self, model: Transformer, batch: dict[str, jax.Array], totals: Totals, key: jax.Array
    ) -> tuple[jax.Array, LossMetrics]:
        """Returns (the loss; its parts, and the share of tokens whose most probable next token is
        the teacher's).
        """
        cfg, weights_BT = self.config.objective.distill, batch["loss_weights"]
        output, theirs, figures = self._figures(model, batch, key)
        loss, sums = self._token_loss(figures, batch, totals)
        share_BT = weights_BT / totals["targets"]
        hidden = output.hidden_BTD, theirs.hidden_BTD
        if cfg.hidden_weight:
            sums["hidden"] = (hidden_distance(*hidden, weights_BT) * share_BT).sum()
            loss += cfg.hidden_weight * sums["hidden"]
        if cfg.inner_weight:
            theirs_LBTE = theirs.stream_LBTD[self._inner_layers]
            inner_LBT = jax.vmap(hidden_distance, (0, 0, None))(
                output.stream_LBTD, theirs_LBTE, weights_BT
            )
            sums["inner"] = (inner_LBT.mean(0) * share_BT).sum()
            loss += cfg.inner_weight * sums["inner"]
        if cfg.affinity_weight:
            affinity_BT = affinity_distance(*hidden, batch["segment_ids"])
            sums["affinity"] = (affinity_BT * share_BT).sum()
            loss += cfg.affinity_weight * sums["affinity"]
        return loss, LossMetrics(jax.lax.stop_gradient(sums), output.stats)

    def _token_loss(self, figures, batch, totals):
        """(the loss of what is said about the next token, its parts and their agreement)."""
        weight, share_BT = self.config.objective.distill.weight, batch["loss_weights"]
        share_BT = share_BT / totals["targets"]
        sums = {
            "next_token": (figures.cross_entropy * share_BT).sum(),
            "divergence": (figures.divergence * share_BT).sum(),
            "agreement": (figures.agrees * share_BT).sum(),
        }
        return (1 - weight) * sums["next_token"] + weight * sums["divergence"], sums

    def evaluate(self, model: Transformer, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns sums over the tokens that count, their number, and the bytes of text."""
        figures, weights_BT = self._figures(model, batch)[2], batch["loss_weights"]
        return {
            "nats": (figures.cross_entropy * weights_BT).sum(),
            "divergence": (figures.divergence * weights_BT).sum(),
            "agrees": (figures.agrees * weights_BT).sum(),
            "targets": weights_BT.sum(),
            "bytes": batch["target_bytes"].sum() if "target_bytes" in batch else jnp.float32(0),
        }

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """As in pre-training, so that the losses compare, with the divergence and the share of
        tokens on which both agree.
        """
        return {
            **super().summary(sums),
            "validation_divergence": sums["divergence"] / sums["targets"],
            "validation_agreement": sums["agrees"] / sums["targets"],
        }

    def _figures(self, model, batch, key=None) -> tuple[Output, Output, "Figures"]:
        """(the student's output, the teacher's, `Figures` of all tokens)."""
        cfg, is_training = self.config.objective.distill, key is not None
        places = (batch["tokens"], batch["positions"], batch["segment_ids"])
        keeps = {"keeps_stream": bool(cfg.inner_weight) and is_training}
        output = model(*places, key=key, is_training=is_training, **keeps)
        teacher: Transformer = nnx.merge(
            abstract_model(self._teacher, model.mesh)[0], batch["teacher"]
        )
        theirs = jax.lax.stop_gradient(teacher(*places, **keeps))

        def compared(hidden_BcD, theirs_BcE, targets_Bc):
            logits = model.logits(hidden_BcD), jax.lax.stop_gradient(teacher.logits(theirs_BcE))
            return compare(cfg, *logits, targets_Bc)

        num_rows = -(-len(batch["tokens"]) // rules.num_shards(model.mesh, "batch"))
        num_chunks = _num_chunks(num_rows, batch["tokens"].shape[1], model.cfg.vocab_size)
        arrays = output.hidden_BTD, theirs.hidden_BTD, batch["targets"]
        return output, theirs, _by_chunks(compared, arrays, num_chunks)


class Figures(NamedTuple):
    """Of each token, float32 [B, T]: cross entropy of the target in nats; divergence from the
    teacher, times the square of the temperature; 1 where both have the same most probable token.
    """

    cross_entropy: jax.Array
    divergence: jax.Array
    agrees: jax.Array


def compare(
    cfg: DistillConfig, ours_BTV: jax.Array, theirs_BTV: jax.Array, targets_BT: jax.Array
) -> Figures:
    """Compares the student's logits with the teacher's and with the data."""
    target_BT = jnp.take_along_axis(ours_BTV, targets_BT[..., None], axis=-1)[..., 0]
    agrees_BT = jnp.argmax(ours_BTV, axis=-1) == jnp.argmax(theirs_BTV, axis=-1)
    return Figures(
        jax.nn.logsumexp(ours_BTV, axis=-1) - target_BT,
        divergence(cfg, ours_BTV, theirs_BTV),
        agrees_BT.astype(jnp.float32),
    )


def divergence(cfg: DistillConfig, ours_BTV: jax.Array, theirs_BTV: jax.Array) -> jax.Array:
    """Returns the divergence that `cfg` names, times temperature squared (arXiv 1503.02531).

    With top_k it is that of k + 1 events: each of the teacher's k most probable tokens, and any
    other token.  That is at most the whole divergence.
    """
    ours, theirs = (logits_BTV / cfg.temperature for logits_BTV in (ours_BTV, theirs_BTV))
    if cfg.top_k and cfg.top_k < ours.shape[-1]:
        top_BTk = jax.lax.top_k(theirs, cfg.top_k)[1]
        ours, theirs = (_of_events(logits_BTV, top_BTk) for logits_BTV in (ours, theirs))
    ours, theirs = jax.nn.log_softmax(ours), jax.nn.log_softmax(theirs)
    p, q = (theirs, ours) if cfg.divergence == "forward" else (ours, theirs)
    return cfg.temperature**2 * (jnp.exp(p) * (p - q)).sum(-1)


def _of_events(logits_BTV: jax.Array, top_BTk: jax.Array) -> jax.Array:
    """Returns the logits of these tokens and of all others together, [B, T, k + 1]."""
    found_BTk = jnp.take_along_axis(logits_BTV, top_BTk, axis=-1)
    rest_BTV = jnp.put_along_axis(logits_BTV, top_BTk, -jnp.inf, axis=-1, inplace=False)
    rest_BT = jax.nn.logsumexp(rest_BTV, axis=-1)
    return jnp.concatenate([found_BTk, rest_BT[..., None]], axis=-1)


def hidden_distance(
    ours_BTD: jax.Array, theirs_BTE: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """Returns the squared distance of each token's hidden states, relative to the square of the
    teacher's, float32 [B, T].

    Where widths differ, the student's go through the linear map that fits them best to the
    teacher's, over the tokens of the micro-batch.  It is at a minimum, so it has no gradient; it
    needs more tokens than the student's width.
    """
    ours, theirs = ours_BTD.astype(jnp.float32), theirs_BTE.astype(jnp.float32)
    square_BT = jnp.maximum(jnp.square(theirs).sum(-1), 1e-30)
    if ours.shape[-1] != theirs.shape[-1]:
        product = functools.partial(
            jnp.einsum, "BTD,BTE,BT->DE", precision="highest", optimize="optimal"
        )
        fixed, weights_BT = jax.lax.stop_gradient(ours), weights_BT / square_BT
        gram_DD = product(fixed, fixed, weights_BT)
        ridge = _RIDGE * jnp.trace(gram_DD) / len(gram_DD) + 1e-30
        map_DE = jnp.linalg.solve(
            gram_DD + ridge * jnp.eye(len(gram_DD)), product(fixed, theirs, weights_BT)
        )
        ours = jnp.einsum("BTD,DE->BTE", ours, map_DE, precision="highest")
    return jnp.square(ours - theirs).sum(-1) / square_BT


def affinity_distance(
    ours_BTD: jax.Array, theirs_BTE: jax.Array, segment_BT: jax.Array
) -> jax.Array:
    """Returns how much the teacher's affinities of each token differ from the student's: the
    divergence of their softmax over the other tokens of the segment, float32 [B, T]
    (TinyCLIP, arXiv 2309.12314).

    An affinity is the cosine of two hidden states over a temperature of 0.1.
    """
    same_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
    seen_BTS = same_BTS & ~jnp.eye(segment_BT.shape[1], dtype=bool)

    def log_affinity(hidden_BTX):
        hidden = hidden_BTX.astype(jnp.float32)
        unit = hidden * jax.lax.rsqrt(jnp.square(hidden).sum(-1, keepdims=True) + 1e-12)
        cosine_BTS = jnp.einsum("BTX,BSX->BTS", unit, unit, precision="highest")
        scores_BTS = jnp.where(seen_BTS, cosine_BTS / _AFFINITY_TEMPERATURE, -1e30)
        return jax.nn.log_softmax(scores_BTS)

    p, q = log_affinity(theirs_BTE), log_affinity(ours_BTD)
    return jnp.where(seen_BTS, jnp.exp(p) * (p - q), 0.0).sum(-1)


def _as_teacher(theirs: ModelConfig, ours: ModelConfig) -> ModelConfig:
    """The teacher as it runs in the step: without dropout or capacity, and in our dtype."""
    return dataclasses.replace(
        theirs,
        moe=dataclasses.replace(theirs.moe, dispatch="dropless", group_size=0),
        dtype=ours.dtype,
        kernels=ours.kernels,
        remat="none",
        num_mtp_layers=theirs.num_mtp_layers,
    )


def _num_chunks(num_rows: int, length: int, vocab_size: int) -> int:
    """Returns the number of parts of each row whose logits are compared at a time."""
    most = max(1, MAX_LOGITS_BYTES // (4 * num_rows * vocab_size))
    return next(n for n in range(1, length + 1) if length % n == 0 and length // n <= most)


def _by_chunks(
    fn: Callable[..., Figures], arrays: tuple[jax.Array, ...], num_chunks: int
) -> Figures:
    """Returns fn(*arrays), [B, T] of arrays [B, T, ...], computed part by part of the rows; the
    backward pass does so again, so that the logits of one part exist at a time.
    """
    if num_chunks == 1:
        return fn(*arrays)

    def split(a_BT):
        return jnp.moveaxis(a_BT.reshape(len(a_BT), num_chunks, -1, *a_BT.shape[2:]), 1, 0)

    found = jax.lax.map(lambda part: jax.checkpoint(fn)(*part), jax.tree.map(split, arrays))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1), found)
