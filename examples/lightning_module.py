"""Lightning's Trainer: the module converts its model and builds the optimizer when it is made."""

from pathlib import Path

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import optimizer_for, rows, run, tiny_model
from torch.utils.data import DataLoader

import poetx


class Model(lightning.LightningModule):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.model, self.losses = tiny_model(), []
        self.optimizer = optimizer_for(self.model, form)  # configure_optimizers comes after a checkpoint

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.optimizer


def main(form: str, directory: Path, steps: int = 6, accumulation: int = 1, resume: bool = False) -> tuple:
    module, start = Model(form), directory / f"step={steps // 2}.ckpt" if resume else None
    saves = [ModelCheckpoint(directory, "{step}", save_top_k=-1, every_n_train_steps=steps // 2)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=steps, accumulate_grad_batches=accumulation, callbacks=saves, **quiet)
    loader = DataLoader(rows(2 * steps), batch_size=4 // accumulation)  # it resumes right between epochs only
    trainer.fit(module, loader, ckpt_path=start, weights_only=True)
    poetx.save_pretrained(module.model, directory / "export")
    return module.model, module.losses


if __name__ == "__main__":
    run(main)
