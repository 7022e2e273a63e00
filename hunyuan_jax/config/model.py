"""The architecture and how it is computed."""

import dataclasses
from typing import Literal, Self

from hunyuan_jax.config.section import Section, divisors, require

Dispatch = Literal["recycle", "drop", "dropless"]
ContextAttention = Literal["auto", "gather", "ring", "all_to_all"]
Remat = Literal["none", "dots", "full"]
RopeType = Literal["default", "plain", "alpha", "linear"]
Dtype = Literal["float32", "bfloat16"]
Scoring = Literal["softmax", "sigmoid"]
BaseBits = Literal["none", "int8", "int4", "fp8"]

MLP_TARGETS = ("gate", "up", "down")
EXPERT_TARGETS = ("expert_gate", "expert_up", "expert_down")
LORA_TARGETS = ("q", "k", "v", "o", *MLP_TARGETS, *EXPERT_TARGETS)


@dataclasses.dataclass(frozen=True)
class MoeConfig(Section):
    """Mixture of experts."""

    section = "model.moe"

    num_experts: int = 1
    """Routed experts per layer; 1 = dense."""
    top_k: int = 1
    """Routed experts per token."""
    intermediate_size: int = 0
    """Width of an expert; 0 = that of model.intermediate_size."""
    scoring: Scoring = "softmax"
    """Scores of the experts: softmax over all of them, or a sigmoid of each."""
    norm_topk_prob: bool = False
    """Renormalise the top-k scores to sum to 1."""
    routed_scale: float = 1.0
    """Factor on the weights of the routed experts."""
    selection_bias: bool = False
    """A bias for each expert, added to its score where experts are chosen, not in the weights."""
    bias_rate: float = 0.0
    """Step of the selection bias in training: up for an expert with less than the mean load, down
    for one with more; 0 = the bias stays."""
    bias_limit: float = 0.0
    """Largest absolute value of a selection bias in training; 0 = none."""
    num_shared_experts: int = 0
    """Shared experts, fused into one MLP of this many times an expert's width; weight 1."""
    dispatch: Dispatch = "dropless"
    """Tokens beyond an expert's capacity: recycle moves them to free slots of other experts, drop
    drops them; dropless has no capacity."""
    capacity_factor: float = 1.0
    """Slots per expert relative to an even share of the group's tokens."""
    min_capacity: int = 1
    """Slots per expert and group, at least."""
    group_size: int = 0
    """Tokens that share one capacity budget; 0 = one sequence."""
    aux_loss_weight: float = 0.0
    """Weight of the load-balancing loss."""
    z_loss_weight: float = 0.0
    """Weight of the router z-loss."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        require(
            self.num_experts >= 1,
            f"config.model.moe.num_experts = {self.num_experts} must be at least 1 (1 = dense).",
        )
        require(
            1 <= self.top_k <= self.num_experts,
            f"config.model.moe.top_k = {self.top_k} must be between 1 and num_experts = "
            f"{self.num_experts}.",
        )
        require(
            self.num_shared_experts >= 0,
            f"config.model.moe.num_shared_experts = {self.num_shared_experts} must not be "
            "negative.",
        )
        require(
            self.num_experts > 1 or self.num_shared_experts == 0,
            f"config.model.moe.num_shared_experts = {self.num_shared_experts} needs num_experts > "
            "1; the dense model has one MLP.",
        )
        require(
            self.capacity_factor > 0,
            f"config.model.moe.capacity_factor = {self.capacity_factor} must be positive.",
        )
        require(
            self.min_capacity >= 1,
            f"config.model.moe.min_capacity = {self.min_capacity} must be at least 1.",
        )
        require(
            self.group_size >= 0,
            f"config.model.moe.group_size = {self.group_size} must be a token count, or 0 for one "
            "sequence.",
        )
        require(
            self.intermediate_size >= 0,
            f"config.model.moe.intermediate_size = {self.intermediate_size} must be a width, or 0 "
            "for that of the model.",
        )
        require(
            self.routed_scale > 0,
            f"config.model.moe.routed_scale = {self.routed_scale} must be positive.",
        )
        for name in ("aux_loss_weight", "z_loss_weight", "bias_rate", "bias_limit"):
            value = getattr(self, name)
            require(value >= 0, f"config.model.moe.{name} = {value} must not be negative.")
        for name in ("bias_rate", "bias_limit"):
            value = getattr(self, name)
            require(
                self.selection_bias or not value,
                f"config.model.moe.{name} = {value} acts on the selection bias; set "
                "selection_bias to true, or leave it at 0.",
            )


@dataclasses.dataclass(frozen=True)
class LoraConfig(Section):
    """Fine-tuning with low-rank adapters on some projections; everything else is frozen."""

    section = "model.lora"

    rank: int = 0
    """Rank of the adapters; 0 = off: all parameters are trained."""
    alpha: float = 16.0
    """An adapter's output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("q", "k", "v", "o")
    """Projections with an adapter: q k v o; gate up down (dense layer or shared expert);
    expert_gate expert_up expert_down (routed experts)."""
    quantize: BaseBits = "none"
    """Holds the frozen projections and experts in few bits (QLoRA), which a layer turns into
    numbers when it is run: int4 (a scale for 128 inputs), int8 or fp8."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        require(
            self.rank >= 0,
            f"config.model.lora.rank = {self.rank} must not be negative; 0 trains all parameters.",
        )
        require(self.alpha > 0, f"config.model.lora.alpha = {self.alpha} must be positive.")
        require(
            self.rank > 0 or self.quantize == "none",
            f"config.model.lora.quantize = {self.quantize!r} holds frozen weights in few bits, "
            "and without adapters all are trained; set config.model.lora.rank.",
        )
        targets = set(self.targets)
        require(
            0 < len(self.targets) == len(targets) and targets <= set(LORA_TARGETS),
            f"config.model.lora.targets = {self.targets} must name projections, each once: "
            f"{', '.join(LORA_TARGETS)}.",
        )

    @property
    def scale(self) -> float:
        """Factor on an adapter's output."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class SparkConfig(Section):
    """Spark Transformer (arXiv 2506.06644): sparse feed-forward layers and sparse attention."""

    section = "model.spark"

    neuron_share: float = 0.0
    """Share of the feed-forward neurons that a token activates (paper: 0.08); 0 = SwiGLU."""
    predictor_width: int = 0
    """Entries of a token that predict its active neurons; 0 = half of hidden_size."""
    attention_top_k: int = 0
    """Keys that a query attends to, about (paper: 256); 0 = all of them."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        require(
            0 <= self.neuron_share < 1,
            f"config.model.spark.neuron_share = {self.neuron_share} must be in [0, 1); 0 is off.",
        )
        for name in ("predictor_width", "attention_top_k"):
            value = getattr(self, name)
            require(value >= 0, f"config.model.spark.{name} = {value} must not be negative.")


@dataclasses.dataclass(frozen=True)
class LatentConfig(Section):
    """CLLA-style attention over 4-bit latents (arXiv 2410.15252)."""

    section = "model.latent"

    width: int = 0
    """Entries of the latent that a group of layers shares (paper: 512); 0 = keys and values."""
    rotary_dim: int = 64
    """Entries of the rotary key that all heads share; queries have as many beside head_dim."""
    group_size: int = 128
    """Latent entries with a common quantisation scale."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        require(
            self.width >= 0 and self.group_size >= 1 and self.width % (2 * self.group_size) == 0,
            f"config.model.latent.width = {self.width} must be a multiple of twice group_size = "
            f"{self.group_size}; 0 is off.",
        )
        require(
            self.rotary_dim >= 2 and self.rotary_dim % 2 == 0,
            f"config.model.latent.rotary_dim = {self.rotary_dim} must be even and at least 2: "
            "RoPE rotates it in halves.",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """Architecture and how it is computed. presets.py has the numbers of released models."""

    section = "model"

    vocab_size: int
    """Rows of the embedding table."""
    hidden_size: int
    """Width of the model."""
    intermediate_size: int
    """Width of an MLP, and of each expert unless moe.intermediate_size says another."""
    num_layers: int
    """Number of layers."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Entries of a head."""
    max_position: int
    """Longest sequence, in tokens."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_type: RopeType = "alpha"
    """Rotary frequencies: default (exact), plain and linear (bfloat16, as in Hunyuan-Large's
    code), or alpha (scaled base)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_alpha: float = 1_000.0
    """rope_type alpha: the base is multiplied by alpha^(d / (d - 2)), d = head_dim."""
    rope_factor: float = 1.0
    """rope_type linear: positions are divided by it."""
    cla_share_factor: int = 1
    """Neighbouring layers that share keys and values; 1 = no cross-layer attention."""
    use_qk_norm: bool = True
    """RMSNorm on queries and keys."""
    norm_before_rope: bool = False
    """Normalise queries and keys before RoPE instead of after it."""
    attention_bias: bool = False
    """Biases on the attention projections."""
    num_dense_layers: int = 0
    """Layers at the bottom that have a dense MLP where the others have experts."""
    num_mtp_layers: int = 0
    """Layers that predict the token after the next (multi-token prediction): 0 or 1."""
    mtp_loss_weight: float = 0.0
    """Weight of the multi-token prediction's loss; 0 = its layer is not trained."""
    tie_embeddings: bool = True
    """Use the embedding table as the output projection."""
    fp32_head: bool = True
    """Keep the logits in float32; otherwise they are rounded to dtype."""
    attention_dropout: float = 0.0
    """Dropout rate of attention weights."""
    hidden_dropout: float = 0.0
    """Dropout rate of what attention and MLP add to the stream."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""
    pad_token_id: int = -1
    """Padding token; its embedding gets no gradient from the lookup; -1 = none."""
    bos_token_id: int = -1
    """Token at the beginning of a text; -1 = none."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a text."""
    dtype: Dtype = "float32"
    """Dtype of activations and matmuls; parameters have float32 masters."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but matmuls (dots), or every layer."""
    kernels: str = "auto"
    """auto, or kernel implementations in order of preference: pallas_tpu, pallas_gpu,xla, ..."""
    context_attention: ContextAttention = "auto"
    """How attention crosses the chips of mesh.context: auto takes the least traffic that fits."""
    moe: MoeConfig = MoeConfig()
    """Mixture of experts."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    spark: SparkConfig = SparkConfig()
    """Sparse feed-forward layers and attention."""
    latent: LatentConfig = LatentConfig()
    """Attention over quantised latents instead of keys and values."""

    def check(self) -> None:
        """Raises ConfigError if the fields break a rule."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
            "cla_share_factor",
        ):
            value = getattr(self, name)
            require(value >= 1, f"config.model.{name} = {value} must be at least 1.")
        self._check_attention()
        self._check_layers()
        for name in ("attention_dropout", "hidden_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"config.model.{name} = {value} must be in [0, 1).")
        require(
            -1 <= self.pad_token_id < self.vocab_size,
            f"config.model.pad_token_id = {self.pad_token_id} is outside the vocabulary of "
            f"{self.vocab_size}.",
        )
        self._check_lora()
        self._check_spark()
        self._check_latent()

    def _check_attention(self) -> None:
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"config.model.num_heads = {self.num_heads} is not divisible by num_kv_heads = "
            f"{self.num_kv_heads}; each K/V head serves an equal share of the query heads. Use "
            f"num_kv_heads from {divisors(self.num_heads)}.",
        )
        require(
            self.head_dim % 2 == 0,
            f"config.model.head_dim = {self.head_dim} must be even: RoPE rotates it in halves.",
        )
        require(
            self.num_layers % self.cla_share_factor == 0,
            f"config.model.num_layers = {self.num_layers} is not divisible by cla_share_factor = "
            f"{self.cla_share_factor}; layers share K/V in whole groups. Use a share factor from "
            f"{divisors(self.num_layers)}.",
        )
        if self.rope_type == "alpha":
            require(
                self.rope_alpha > 0,
                f"config.model.rope_alpha = {self.rope_alpha} must be positive (1.0 leaves the "
                "base as it is).",
            )
            require(
                self.head_dim > 2,
                f"config.model.head_dim = {self.head_dim} must be above 2 for rope_type 'alpha'.",
            )
        if self.rope_type == "linear":
            require(
                self.rope_factor > 0,
                f"config.model.rope_factor = {self.rope_factor} must be positive.",
            )

    def _check_layers(self) -> None:
        require(
            0 <= self.num_dense_layers < self.num_layers,
            f"config.model.num_dense_layers = {self.num_dense_layers} must leave layers with "
            f"experts of num_layers = {self.num_layers}.",
        )
        require(
            self.is_moe or not self.num_dense_layers,
            f"config.model.num_dense_layers = {self.num_dense_layers} is for models with experts; "
            "set it to 0, or moe.num_experts above 1.",
        )
        require(
            self.num_mtp_layers in (0, 1),
            f"config.model.num_mtp_layers = {self.num_mtp_layers} must be 0 or 1.",
        )
        require(
            self.mtp_loss_weight >= 0 and (self.num_mtp_layers or not self.mtp_loss_weight),
            f"config.model.mtp_loss_weight = {self.mtp_loss_weight} must not be negative, and "
            f"needs a layer (num_mtp_layers = {self.num_mtp_layers}).",
        )
        for name, value in (
            ("num_dense_layers", self.num_dense_layers),
            ("num_mtp_layers", self.num_mtp_layers),
            ("norm_before_rope", self.norm_before_rope),
        ):
            require(
                self.cla_share_factor == 1 or not value,
                f"config.model.{name} = {value} is for models whose layers do not share keys and "
                f"values; set cla_share_factor to 1 (now {self.cla_share_factor}).",
            )
        require(
            self.use_qk_norm or not self.norm_before_rope,
            "config.model.norm_before_rope is about the norms of queries and keys; set "
            "use_qk_norm to true.",
        )

    def _check_lora(self) -> None:
        has_mlp = not self.is_moe or self.moe.num_shared_experts > 0 or self.num_dense_layers > 0
        for targets, is_there, module in (
            (MLP_TARGETS, has_mlp, "shared expert"),
            (EXPERT_TARGETS, self.is_moe, "routed experts"),
        ):
            wrong = [target for target in self.lora.targets if target in targets]
            require(
                is_there or not wrong,
                f"config.model.lora.targets names {', '.join(wrong)}, but the model has no "
                f"{module}; leave it out.",
            )
        require(
            not (self.lora.rank and self.moe.bias_rate),
            f"config.model.moe.bias_rate = {self.moe.bias_rate} would change the frozen model "
            "that adapters are trained for; set it to 0.",
        )

    def _check_spark(self) -> None:
        spark = self.spark
        require(
            not (spark.neuron_share and self.is_moe),
            f"config.model.spark.neuron_share = {spark.neuron_share} is for dense models; set "
            f"moe.num_experts = 1 (now {self.moe.num_experts}), or neuron_share = 0.",
        )
        require(
            spark.neuron_share > 0 or spark.predictor_width == 0,
            f"config.model.spark.predictor_width = {spark.predictor_width} acts with "
            "spark.neuron_share only; set that too.",
        )
        require(
            not spark.neuron_share or 0 < self.predictor_width < self.hidden_size,
            f"config.model.spark.predictor_width = {self.predictor_width} must leave entries of "
            f"hidden_size = {self.hidden_size} for the neurons' values.",
        )
        require(
            not (
                spark.neuron_share and self.lora.rank and set(self.lora.targets) & {*MLP_TARGETS}
            ),
            f"config.model.lora.targets = {self.lora.targets} names gate, up or down, which a "
            "Spark layer does not have; leave them out.",
        )
        if spark.attention_top_k:
            require(
                self.head_dim % 4 == 0,
                f"config.model.head_dim = {self.head_dim} must be a multiple of 4: Spark "
                "attention rotates both halves of a head.",
            )
            require(
                not self.attention_dropout,
                f"config.model.attention_dropout = {self.attention_dropout} is not implemented "
                "for Spark attention; set it to 0.",
            )

    def _check_latent(self) -> None:
        if not self.latent.width:
            return
        for name, value, off in (
            ("use_qk_norm", self.use_qk_norm, False),
            ("attention_bias", self.attention_bias, False),
            ("spark.attention_top_k", self.spark.attention_top_k, 0),
        ):
            require(
                value == off,
                f"config.model.{name} = {value} does not act on latent attention (latent.width = "
                f"{self.latent.width}); set it to {off}.",
            )
        require(
            self.num_kv_heads == self.num_heads,
            f"config.model.num_kv_heads = {self.num_kv_heads} must be num_heads = "
            f"{self.num_heads} with latent attention: every head has keys and values of its own.",
        )
        targets = set(self.lora.targets) & {"q", "k", "v", "o"}
        require(
            not (self.lora.rank and targets),
            f"config.model.lora.targets = {self.lora.targets}: latent attention has no adapters; "
            "take gate, up and down.",
        )

    @property
    def rope_dim(self) -> int:
        """Entries that RoPE rotates as one: a head, half of one, or the shared rotary key."""
        if self.latent.width:
            return self.latent.rotary_dim
        return self.head_dim // 2 if self.spark.attention_top_k else self.head_dim

    @property
    def predictor_width(self) -> int:
        """Entries of a token that predict the active neurons of a Spark layer."""
        return self.spark.predictor_width or self.hidden_size // 2

    @property
    def is_moe(self) -> bool:
        """Whether the layers hold routed experts."""
        return self.moe.num_experts > 1

    @property
    def expert_size(self) -> int:
        """Width of an expert."""
        return self.moe.intermediate_size or self.intermediate_size

    @property
    def num_groups(self) -> int:
        """Number of CLA groups: the scan length and the number of KV cache entries."""
        return self.num_layers // self.cla_share_factor

    @property
    def stacks(self) -> dict[str, Self]:
        """The layers as stacks of equal groups, from the bottom up: name -> a model that has no
        others.  The layer of multi-token prediction is the last, "mtp_groups".
        """
        num_dense, rest = self.num_dense_layers, {"num_dense_layers": 0, "num_mtp_layers": 0}
        rest["mtp_loss_weight"] = 0.0

        def stack(num_layers: int, moe: MoeConfig = self.moe) -> Self:
            has_mlp = moe.num_experts == 1 or moe.num_shared_experts > 0
            absent = {*(() if has_mlp else MLP_TARGETS)}
            absent |= {*(EXPERT_TARGETS if moe.num_experts == 1 else ())}
            targets = tuple(target for target in self.lora.targets if target not in absent)
            lora = dataclasses.replace(self.lora, targets=targets) if targets else LoraConfig()
            return dataclasses.replace(self, num_layers=num_layers, moe=moe, lora=lora, **rest)

        if not num_dense and not self.num_mtp_layers:
            return {"groups": self}
        found = {"dense_groups": stack(num_dense, MoeConfig())} if num_dense else {}
        found["groups"] = stack(self.num_layers - num_dense)
        if self.num_mtp_layers:  # without adapters
            found["mtp_groups"] = dataclasses.replace(stack(1), lora=LoraConfig())
        return found
