"""Accelerate: ``prepare``, ``accumulate``, ``save_state`` and ``load_state`` as for any model and optimizer."""

import itertools
from pathlib import Path

from accelerate import Accelerator
from tiny import optimizer_for, rows, run, tiny_model
from torch.utils.data import DataLoader

import poetx


def main(form: str, directory: Path, steps: int = 6, accumulation: int = 1, resume: bool = False) -> tuple:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = tiny_model()
    optimizer = optimizer_for(model, form)  # before prepare, which may wrap the model
    loader = DataLoader(rows(), batch_size=4 // accumulation)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    taken, losses = 0, []
    if resume:
        accelerator.load_state(str(directory / "checkpoint"))
        taken = steps // 2
        loader = accelerator.skip_first_batches(loader, taken * accumulation)
    for batch in itertools.islice(loader, (steps - taken) * accumulation):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        taken += accelerator.sync_gradients
        if accelerator.sync_gradients and taken == steps // 2:
            accelerator.save_state(str(directory / "checkpoint"))
    module = accelerator.unwrap_model(model)
    poetx.save_pretrained(module, directory / "export")
    return module, losses


if __name__ == "__main__":
    run(main)
