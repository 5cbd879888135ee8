"""The shipped model trained with 4-bit operands by transformers' Trainer, which needs to know nothing of it.

python examples/trainer_hf.py [--steps 10] [--out DIR]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

import halfbyte as hb
from halfbyte.demo import DATA
from halfbyte.nn import Watcher, convert
from halfbyte.recipe import TrainingRecipe
from halfbyte.runtime import save_quantized


class Statistics(TrainerCallback):
    """Counts once in every `every` steps; a TensorBoard writer could be given to `step`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.watcher = Watcher(model)
        self.worst = ("", float("inf"))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        for name, operands in self.watcher.step().items():
            if "activations" in operands:
                self.worst = min(self.worst, (name, operands["activations"]["snr_db"]), key=lambda item: item[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--out", type=Path, help="a new directory for the checkpoint")
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(DATA / "tiny")
    model: Any = AutoModelForCausalLM.from_pretrained(DATA / "tiny", dtype=torch.float32)
    text = (DATA / "text" / "train.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    rows: list[dict[str, Tensor]] = [{"input_ids": w, "labels": w} for w in ids.split(args.window)[:-1]]
    recipe = TrainingRecipe(activations=hb.NVFP4(scaling="row"), backward="dequantized")
    report = convert(model, recipe)
    print(f"{len(report.converted)} modules compute in NVFP4 now")
    with tempfile.TemporaryDirectory() as temporary:
        statistics = Statistics(model)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=temporary,
                max_steps=args.steps,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                gradient_checkpointing=True,
                learning_rate=2e-4,
                logging_steps=max(1, args.steps // 5),
                save_strategy="no",
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=False,
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=rows,
            callbacks=[statistics],
        )
        result = trainer.train()
        statistics.watcher.remove()
        print(f"mean training loss {result.training_loss:.3f} over {args.steps} steps")
        print(f"the noisiest activations: {statistics.worst[0]}, {statistics.worst[1]:.1f} dB")
        out = args.out or Path(temporary) / "out"
        written = save_quantized(model, DATA / "tiny", out, recipe.options())
        print(f"exported at {written.bits_per_weight:.2f} bits per quantized weight")


if __name__ == "__main__":
    main()
