"""DistributedDataParallel: ``torchrun --nproc-per-node 2 examples/ddp.py``, with no poetx call of its own."""

from pathlib import Path

import torch.distributed as dist
from tiny import load, optimizer_for, rows, run, save, tiny_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import poetx


def main(form: str, directory: Path, steps: int = 6, accumulation: int = 1, resume: bool = False) -> tuple:
    rank, ranks, start, module, losses = dist.get_rank(), dist.get_world_size(), 0, tiny_model(), []
    optimizer = optimizer_for(module, form)
    if resume:
        start = load(directory / "checkpoint.pt", module, optimizer)
    model = DistributedDataParallel(module)
    mine = DataLoader(rows()[rank::ranks], batch_size=4 // ranks // accumulation)
    for index, batch in list(enumerate(mine))[start * accumulation : steps * accumulation]:
        model.require_backward_grad_sync = (index + 1) % accumulation == 0
        loss = model(**batch).loss
        (loss / accumulation).backward()
        losses.append(loss.item())
        if model.require_backward_grad_sync:
            optimizer.step()
            optimizer.zero_grad()
            step = (index + 1) // accumulation
            if step == steps // 2 and rank == 0:
                save(directory / "checkpoint.pt", module, optimizer, step)
    if rank == 0:
        poetx.save_pretrained(module, directory / "export")
    dist.barrier()
    return module, losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run(main)
    dist.destroy_process_group()
