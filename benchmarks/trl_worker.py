"""The first steps of TRL's trainers, for post_training.py: KIND FOLDER DATA STEPS.

Prints one JSON object: loss and gradient norm of each step, and seconds from step to step.
"""

import json
import sys
import tempfile
import time

import torch
import transformers
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


class Clock(transformers.TrainerCallback):
    """Keeps when each step ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        """Called after the optimizer's step."""
        self.ends.append(time.perf_counter())


def main(kind: str, folder: str, data: str, num_steps: int) -> None:
    """Trains and prints."""
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    clock = Clock()
    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": len(rows),
        "max_steps": num_steps,
        "max_length": 256,
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
    if kind == "sft":
        trainer_of, config = SFTTrainer, SFTConfig(**common)
    else:
        trainer_of, config = DPOTrainer, DPOConfig(loss_type=[kind], beta=0.1, **common)
    trainer = trainer_of(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        callbacks=[clock],
    )
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
