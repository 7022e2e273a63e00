"""Fields that are set and change nothing, given the others.  Imports no jax."""

from hunyuan_jax.config.parse import defaults, field_names, flat_fields, to_dict
from hunyuan_jax.config.run import Config


def without_effect(config: Config) -> list[str]:
    """One line for each field that is not at its default and has no effect: value, reason, remedy.

    A router without a gradient is among them.  They are warnings, not errors: such a run is valid,
    and a sweep may pass through it.
    """
    values, default = dict(flat_fields(to_dict(config))), defaults()
    return [
        f"config.{name} = {values[name]!r} has no effect: {reason}."
        for names, reason in _idle(config)
        for name in names
        if values[name] != default[name]
    ]


def _idle(config: Config) -> list[tuple[tuple[str, ...], str]]:
    """(fields, why nothing reads them) for every rule that holds for `config`."""
    model, moe, schedule = config.model, config.model.moe, config.schedule
    online = config.objective.dpo.online
    capacity = ("model.moe.capacity_factor", "model.moe.min_capacity")
    rules = [
        (
            not model.is_moe,
            (
                *("model.moe.norm_topk_prob", "model.moe.dispatch", *capacity),
                *("model.moe.group_size", "model.moe.aux_loss_weight", "model.moe.z_loss_weight"),
                *("model.moe.intermediate_size", "model.moe.scoring", "model.moe.routed_scale"),
                *("model.moe.selection_bias", "model.moe.bias_rate", "model.moe.bias_limit"),
                "optimizer.expert_lr_ratio",
            ),
            "the model is dense; set config.model.moe.num_experts above 1",
        ),
        (
            model.is_moe and moe.dispatch == "dropless",
            capacity,
            "config.model.moe.dispatch = 'dropless' has no capacity; take recycle or drop",
        ),
        (
            model.is_moe
            and moe.top_k == 1
            and moe.dispatch != "recycle"
            and not model.lora.rank,  # which freezes the router
            ("model.moe.norm_topk_prob",),
            "with top_k = 1 every weight is p / p = 1, so the router "
            + (
                "learns from aux_loss_weight and z_loss_weight alone"
                if moe.aux_loss_weight or moe.z_loss_weight
                else "gets no gradient and stays as it is"
            )
            + "; set it to False to train the router on the text, or keep it for weights that "
            "were trained so",
        ),
        (
            model.is_moe and not moe.bias_rate,
            ("model.moe.bias_limit",),
            "config.model.moe.bias_rate = 0 moves no bias; set a rate",
        ),
        (
            model.dtype == "float32" and not model.fp32_head,
            ("model.fp32_head",),
            "config.model.dtype = 'float32' has float32 logits; it acts with 'bfloat16'",
        ),
        (
            model.rope_type != "alpha",
            ("model.rope_alpha",),
            f"config.model.rope_type = {model.rope_type!r}; it acts with 'alpha'",
        ),
        (
            model.rope_type != "linear",
            ("model.rope_factor",),
            f"config.model.rope_type = {model.rope_type!r}; it acts with 'linear'",
        ),
        (
            not model.lora.rank,
            ("model.lora.alpha", "model.lora.targets"),
            "config.model.lora.rank = 0 trains all parameters; set a rank",
        ),
        (
            not model.latent.width,
            ("model.latent.rotary_dim", "model.latent.group_size"),
            "config.model.latent.width = 0 is attention over keys and values; set a width",
        ),
        (
            not config.optimizer.spike_factor,
            ("optimizer.spike_after",),
            "config.optimizer.spike_factor = 0 skips no spikes; set a factor",
        ),
        (
            schedule.name != "three_phase",
            ("schedule.decay_ratio", "schedule.anneal_fraction", "schedule.anneal_ratio"),
            f"config.schedule.name = {schedule.name!r}; it acts with 'three_phase'",
        ),
        (
            schedule.name != "cosine_with_min_lr",
            ("schedule.min_lr",),
            f"config.schedule.name = {schedule.name!r}; it acts with 'cosine_with_min_lr'",
        ),
        (
            schedule.name == "three_phase" and not schedule.anneal_fraction,
            ("schedule.anneal_ratio",),
            "config.schedule.anneal_fraction = 0 does not anneal; set a fraction",
        ),
        *(
            (
                config.objective.name != name,
                tuple(n for n in field_names() if n.startswith(f"objective.{name}.")),
                f"config.objective.name = {config.objective.name!r}; it acts with {name!r}",
            )
            for name in ("dpo", "grpo", "distill")
        ),
        (
            config.objective.name == "distill" and bool(config.train.init_from),
            tuple(
                f"objective.distill.{name}"
                for name in ("inherit", "inherit_from", "groups", "mask_steps")
            ),
            "config.train.init_from names the student's first weights; leave it empty to cut them "
            "out of a larger model",
        ),
        (
            config.objective.name == "dpo" and not online.share,
            tuple(n for n in field_names() if n.startswith("objective.dpo.online.")),
            "config.objective.dpo.online.share = 0 draws no answers; set a share",
        ),
        (
            config.objective.name == "dpo" and online.share > 0 and not online.endpoint,
            tuple(
                f"objective.dpo.online.{name}"
                for name in ("endpoint_model", "criterion", "timeout", "retries")
            ),
            "config.objective.dpo.online.endpoint is empty; they are about its requests",
        ),
        (
            config.objective.name == "distill" and config.objective.distill.inherit == "none",
            ("objective.distill.inherit_from", "objective.distill.groups"),
            "config.objective.distill.inherit = 'none' draws random weights; take 'magnitude'",
        ),
        (
            config.objective.name == "distill" and config.objective.distill.inherit != "mask",
            ("objective.distill.mask_steps",),
            f"config.objective.distill.inherit = {config.objective.distill.inherit!r} learns no "
            "masks; take 'mask'",
        ),
        (
            config.objective.name == "distill" and not config.objective.distill.inner_weight,
            ("objective.distill.inner_layers",),
            "config.objective.distill.inner_weight = 0 matches no layers; set a weight",
        ),
        (
            config.objective.name == "grpo",
            ("data.validation_fraction", "train.eval_every", "train.eval_batches"),
            "config.objective.name = 'grpo' holds nothing out; its rewards are of new completions",
        ),
        (
            bool(config.train.profile_steps)
            and config.train.profiled.start > config.train.num_steps,
            ("train.profile_steps",),
            f"the run ends at step {config.train.num_steps}; name earlier steps",
        ),
    ]
    return [(names, reason) for holds, names, reason in rules if holds]
