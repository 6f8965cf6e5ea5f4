"""Run a function on ranks of a gloo process group, each a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def context() -> Any:
    """Processes that have the imports done, once for all of them."""
    context = multiprocessing.get_context("forkserver")
    ours = ("convert", "materialize", "methods.single_step", "optim.build", "optim.single_step", "train.run")
    models = ("gpt2.modeling_gpt2", "llama.modeling_llama")
    all_do = [*(f"poetx.{name}" for name in ours), *(f"transformers.models.{name}" for name in models), "pytest"]
    context.set_forkserver_preload(all_do)
    return context


def _rank(rank: int, ranks: int, directory: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store-{ranks}", rank=rank, world_size=ranks)
    function(rank, directory, *args)
    dist.destroy_process_group()
    # DistributedDataParallel keeps the group's threads alive beyond this (torch 2.13), and one that drops the last
    # reference to a tensor while the interpreter shuts down aborts the process. So it does not shut down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_on_ranks(ranks: int, function: Callable[..., None], directory: str, *args: Any) -> None:
    """Call ``function(rank, directory, *args)`` on every rank; an exception on one of them is raised here."""
    context()
    start_processes(_rank, args=(ranks, directory, function, args), nprocs=ranks, start_method="forkserver")


def run_on_two_ranks(function: Callable[..., None], directory: str, *args: Any) -> None:
    """:func:`run_on_ranks` 0 and 1."""
    run_on_ranks(2, function, directory, *args)
