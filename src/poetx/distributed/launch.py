"""Becoming one rank of the group that ``torchrun`` starts, and leaving it.

``torchrun`` says in the environment who a process is: RANK of WORLD_SIZE, LOCAL_RANK on its machine, and how often it
was started again. Nothing here imports torch where there is one process.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator

from poetx.errors import UserError, one_line

logger = logging.getLogger(__name__)

#: A step waits this long for a rank that neither answers nor has closed its connection.
TIMEOUT = datetime.timedelta(minutes=10)
#: And this long for what one rank does alone: tokenizing, writing a checkpoint, exporting.
PATIENCE = datetime.timedelta(days=2)
#: Seconds for a host's name to become known, and before it is said that others are waited for.
PATIENT = 15

#: What gloo, NCCL and the store say of a peer that is gone.
_LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "Timeout", "remote process")


class LostRankError(RuntimeError):
    """Another rank has ended or does not answer, so this one cannot go on. The message is one line."""


def started_ranks() -> int:
    """How many processes ``torchrun``, or whoever set WORLD_SIZE, has started; 1 without it.

    Raises:
        UserError: WORLD_SIZE is no whole number of at least 1.
    """
    world = os.environ.get("WORLD_SIZE") or "1"
    if not world.isdecimal() or world == "0":
        raise UserError(f"WORLD_SIZE={world}: must be a whole number of processes; start them with torchrun")
    return int(world)


def _number(name: str, end: int) -> int:
    value = os.environ[name]
    if not value.isdecimal() or int(value) >= end:
        raise UserError(f"{name}={value}: must be a whole number below {end}; start the processes with torchrun")
    return int(value)


def was_restarted() -> bool:
    """Whether ``torchrun --max-restarts`` has started this process again, after one of the group failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Belong to the process group in the ``with`` block: gloo between CPUs, NCCL between GPUs, one for each process.

    Does nothing in a lone process, and inside itself. A group that is there already is used and left as it is.

    Raises:
        UserError: the group cannot be formed. LostRankError: another rank ended inside the block.
    """
    if started_ranks() == 1 and not _initialized():
        yield
        return
    import torch
    from torch import distributed
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    from poetx.distributed import agreement

    if agreement.patient_group() is not None:
        with _lost_ranks_named():
            yield
        return
    own = not distributed.is_initialized()
    if own:
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise UserError(
                f"WORLD_SIZE={started_ranks()} without {missing[0]}: one process cannot find the others; start them "
                "with torchrun"
            )
        on_cuda = torch.cuda.is_available()
        if on_cuda:
            torch.cuda.set_device(local_device())
        rank, ranks = _number("RANK", started_ranks()), started_ranks()
        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        place = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 1 << 16)
        # torchrun may keep its store over restarts, and with it the addresses of processes that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        _check_resolves(place[0])
        waiting = threading.Timer(
            PATIENT, logger.warning, ("rank %d waits for the others at %s:%d (MASTER_ADDR, MASTER_PORT)", rank, *place)
        )
        waiting.daemon = True
        waiting.start()
        try:
            store = PrefixStore(f"poetx/{attempt}", TCPStore(*place, ranks, is_master=hosts, timeout=TIMEOUT))
            distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the processes cannot find each other: {one_line(error)[:200]}") from None
        finally:
            waiting.cancel()
    together = True
    try:
        with _lost_ranks_named():
            agreement.set_patient_group(distributed.new_group(backend="gloo", timeout=PATIENCE))
            yield
    except BaseException as error:
        together = isinstance(error, (UserError, OSError))
        raise
    finally:
        agreement.set_patient_group(None)
        if own and together:  # else the others may be waiting for this one, and taking leave of them wait for them
            distributed.destroy_process_group()


def _check_resolves(host: str) -> None:
    """Refuse a MASTER_ADDR that has no address within ``PATIENT`` seconds: names of containers may come late."""
    end = time.monotonic() + PATIENT
    while True:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"MASTER_ADDR={host}: no such host ({error.strerror}); set it to that of rank 0"
                ) from None
            time.sleep(1)
        else:
            return


@contextlib.contextmanager
def _lost_ranks_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostRankError) or not any(text in str(error) for text in _LOST):
            raise
        from poetx.distributed.ranks import rank, rank_count

        raise LostRankError(
            f"rank {rank()} of {rank_count()}: another rank has ended or does not answer, so this one ends, too"
        ) from error


def local_device() -> int:
    """The GPU of this process among those of its machine.

    Raises:
        UserError: the machine has fewer GPUs than processes.
    """
    import torch

    count = torch.cuda.device_count()
    index = _number("LOCAL_RANK", 1 << 16) if os.environ.get("LOCAL_RANK") else 0
    if index >= count:
        raise UserError(
            f"local rank {index}: this machine has {count} CUDA devices; start as many processes "
            f"(--nproc-per-node={count})"
        )
    return index


def _initialized() -> bool:
    import sys

    if "torch.distributed" not in sys.modules:
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
