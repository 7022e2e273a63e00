"""The first steps of TRL's trainers, for post_training.py: KIND FOLDER DATA STEPS.

DATA of grpo is a folder with our batch of each step, i.npz.  Prints one JSON object: loss and
gradient norm of each step, and seconds from step to step.
"""

import json
import sys
import tempfile
import time

import numpy as np
import torch
import transformers
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer


class Clock(transformers.TrainerCallback):
    """Keeps when each step ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        """Called after the optimizer's step."""
        self.ends.append(time.perf_counter())


class Recorded(GRPOTrainer):
    """Is given completions, advantages and log-probabilities instead of drawing them."""

    def _generate_and_score_completions(self, inputs):
        batch = np.load(f"{self.folder}/{self.state.global_step}.npz")
        learned_BT = batch["loss_weights"] > 0
        starts = learned_BT.argmax(1)
        num_prompt, num_completion = starts.max() + 1, learned_BT.sum(1).max()
        rows = {
            "prompt_ids": np.zeros((len(starts), num_prompt), np.int64),
            "prompt_mask": np.zeros((len(starts), num_prompt), np.int64),
            "completion_ids": np.zeros((len(starts), num_completion), np.int64),
            "completion_mask": np.zeros((len(starts), num_completion), np.int64),
            "old_per_token_logps": np.zeros((len(starts), num_completion), np.float32),
        }
        for b, start in enumerate(starts):
            rows["prompt_ids"][b, -start - 1 :] = batch["tokens"][b, : start + 1]
            rows["prompt_mask"][b, -start - 1 :] = 1
            count = learned_BT[b].sum()
            rows["completion_ids"][b, :count] = batch["targets"][b, learned_BT[b]]
            rows["completion_mask"][b, :count] = 1
            rows["old_per_token_logps"][b, :count] = batch["rollout_logprobs"][b, learned_BT[b]]
        found = {name: torch.from_numpy(value) for name, value in rows.items()}
        found["advantages"] = torch.from_numpy(batch["advantages"])
        found["num_items_in_batch"] = found["completion_mask"].sum()
        return found


def main(kind: str, folder: str, data: str, num_steps: int) -> None:
    """Trains and prints."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    clock = Clock()
    common = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": num_steps,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }
    if kind == "grpo":
        rows = [{"prompt": "not read"}] * 16
        common |= {"per_device_train_batch_size": len(rows), "num_generations": 8}
        config = GRPOConfig(loss_type="bnpo", delta=2.0, temperature=1.0, beta=0.0, **common)
        trainer_of, more = Recorded, {"reward_funcs": lambda completions, **columns: []}
    else:
        with open(data, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        common |= {"per_device_train_batch_size": len(rows), "max_length": 256}
        more = {}
        if kind == "sft":
            trainer_of, config = SFTTrainer, SFTConfig(**common)
        else:
            trainer_of, config = DPOTrainer, DPOConfig(loss_type=[kind], beta=0.1, **common)
    trainer = trainer_of(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        callbacks=[clock],
        **more,
    )
    trainer.folder = data
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    found = {
        "loss": [row["loss"] for row in steps],
        "grad_norm": [row["grad_norm"] for row in steps],
        "seconds": [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
