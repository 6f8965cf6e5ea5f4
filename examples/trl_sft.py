"""TRL's supervised fine-tuning: its trainer is a Trainer, and ``attach`` takes every such."""

from pathlib import Path

from datasets import Dataset
from tiny import FORMS, LR, SETTINGS, rows, run, tiny_model, tiny_tokenizer
from trl import SFTConfig, SFTTrainer

import poetx
from poetx.integrations.transformers import attach


def main(form: str, directory: Path, steps: int = 6, accumulation: int = 1, resume: bool = False) -> tuple:
    model, config, tokenizer = tiny_model(), FORMS[form], tiny_tokenizer()
    texts = [tokenizer.decode(row["input_ids"]) for row in rows()]
    args = SFTConfig(
        str(directory),
        learning_rate=LR,
        max_steps=steps,
        save_steps=steps // 2,
        logging_steps=1,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    data = {"train_dataset": Dataset.from_dict({"text": texts}), "processing_class": tokenizer}
    if config is None:  # an ordinary model: hand the optimizer over
        data["optimizers"] = (poetx.POETX(model, lr=LR, **SETTINGS[form]), None)
    trainer = SFTTrainer(model, args, **data)
    if config is not None:
        attach(trainer, config, **SETTINGS[form])
    trainer.train(resume_from_checkpoint=str(directory / f"checkpoint-{steps // 2}") if resume else None)
    poetx.save_pretrained(model, directory / "export")
    return model, [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    run(main)
