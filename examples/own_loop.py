"""A loop of one's own: gradient accumulation, a checkpoint that resumes to the bit, a plain model in the end."""

from pathlib import Path

from tiny import load, optimizer_for, rows, run, save, tiny_model
from torch.utils.data import DataLoader

import poetx


def main(form: str, directory: Path, steps: int = 6, accumulation: int = 1, resume: bool = False) -> tuple:
    model, start, losses = tiny_model(), 0, []
    optimizer = optimizer_for(model, form)
    if resume:
        start = load(directory / "checkpoint.pt", model, optimizer)
    for step, batch in enumerate(DataLoader(rows(), batch_size=4)):
        if not start <= step < steps:
            continue
        for part in zip(*(values.chunk(accumulation) for values in batch.values()), strict=True):
            loss = model(**dict(zip(batch, part, strict=True))).loss / accumulation
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() * accumulation)
        if step + 1 == steps // 2:
            save(directory / "checkpoint.pt", model, optimizer, step + 1)
    poetx.save_pretrained(model, directory / "export")
    return model, losses


if __name__ == "__main__":
    run(main)
