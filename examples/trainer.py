"""Transformers' Trainer: one call before ``train()``. Its checkpoints resume to the bit and load as plain models."""

from pathlib import Path

from tiny import FORMS, LR, SETTINGS, rows, run, tiny_model
from transformers import Trainer, TrainingArguments

import poetx
from poetx.integrations.transformers import attach


def main(form: str, directory: Path, steps: int = 6, accumulation: int = 1, resume: bool = False) -> tuple:
    model, config = tiny_model(), FORMS[form]
    args = TrainingArguments(
        str(directory),
        learning_rate=LR,
        max_steps=steps,
        save_steps=steps // 2,
        logging_steps=1,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        report_to="none",
        use_cpu=True,
    )
    if config is None:  # an ordinary model: hand the optimizer over
        optimizer = poetx.POETX(model, lr=LR, **SETTINGS[form])
        trainer = Trainer(model, args, train_dataset=rows(), optimizers=(optimizer, None))
    else:
        trainer = Trainer(model, args, train_dataset=rows())
        attach(trainer, config, **SETTINGS[form])
    trainer.train(resume_from_checkpoint=str(directory / f"checkpoint-{steps // 2}") if resume else None)
    poetx.save_pretrained(model, directory / "export")
    return model, [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    run(main)
