"""Lightning Fabric: ``setup``, ``backward``, ``save`` and ``load`` as for any model and optimizer."""

from pathlib import Path

from lightning.fabric import Fabric
from tiny import optimizer_for, rows, run, tiny_model
from torch.utils.data import DataLoader

import poetx


def main(form: str, directory: Path, steps: int = 6, accumulation: int = 1, resume: bool = False) -> tuple:
    fabric = Fabric(accelerator="cpu", devices=1)
    module = tiny_model()
    model, optimizer = fabric.setup(module, optimizer_for(module, form))
    state = {"model": model, "optimizer": optimizer, "step": 0}
    if resume:
        fabric.load(directory / "checkpoint.ckpt", state)
    losses, start = [], state["step"] * accumulation
    loader = fabric.setup_dataloaders(DataLoader(rows(), batch_size=4 // accumulation))
    for index, batch in enumerate(loader):
        if not start <= index < steps * accumulation:
            continue
        last = (index + 1) % accumulation == 0
        with fabric.no_backward_sync(model, enabled=not last):
            loss = model(**batch).loss
            fabric.backward(loss / accumulation)
        losses.append(loss.item())
        if last:
            optimizer.step()
            optimizer.zero_grad()
            state["step"] += 1
            if state["step"] == steps // 2:
                fabric.save(directory / "checkpoint.ckpt", state)
    poetx.save_pretrained(module, directory / "export")
    return module, losses


if __name__ == "__main__":
    run(main)
