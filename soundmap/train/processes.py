"""Several processes that train one model: what they tell each other.

torchrun starts them and says in the environment which is which. Alone, a process finds nothing
there, and every function here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from soundmap.errors import UsageError

_BUCKET = 1 << 25


@dataclass(frozen=True)
class Processes:
    """One of the processes of a run."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.rank == 0


def join_processes(device: str) -> Processes:
    """Find out which process this is, and meet the others.

    Parameters
    ----------
    device
        "auto" takes a GPU where there is one: each process of a machine its own.

    Raises
    ------
    UsageError
        There is no such device, or there are fewer GPUs than processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"there is no device {device!r}: auto, cpu or cuda") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("device cuda: torch finds no GPU here; take cpu, or auto")
        if world > 1 and local >= torch.cuda.device_count():
            raise UsageError(
                f"process {local} of this machine has no GPU of its own "
                f"({torch.cuda.device_count()} here): start fewer with --nproc-per-node"
            )
        if chosen.index is None:
            chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Processes(rank, world, chosen)


def leave(processes: Processes) -> None:
    """Part from the others."""
    if processes.world > 1 and dist.is_initialized():
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """Rows of all processes.

    Every process goes on to compute the same loss of all rows, so the sum over processes of the
    gradients of its own rows is the gradient here times their number; nothing need be sent back.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, world: int) -> Tensor:
        ctx.place = (rank, world, len(rows))
        parts = [torch.empty_like(rows) for _ in range(world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rank, world, count = ctx.place
        return grad[rank * count : (rank + 1) * count] * world, None, None


def gather(rows: Tensor, processes: Processes) -> Tensor:
    """Rows of all processes, one after the other: [B, ...] to [world * B, ...].

    With gradients: if every process computes the same loss of the result, then `average` of the
    gradients of the weights is the gradient of that loss, as one process would have found it.
    """
    if processes.world == 1:
        return rows
    if rows.dtype == torch.bool:
        return gather(rows.to(torch.uint8), processes).bool()
    result: Tensor = _Gather.apply(rows, processes.rank, processes.world)
    return result


def average(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """Average the gradients over all processes; one that has none counts as zero."""
    if processes.world == 1:
        return
    bucket: list[Tensor] = []
    size = 0

    def send() -> None:
        nonlocal bucket, size
        if not bucket:
            return
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat)
        flat /= processes.world
        for grad, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            grad.copy_(part.view_as(grad))
        bucket, size = [], 0

    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.numel()
        if size >= _BUCKET:
            send()
    send()


def share_buffers(model: nn.Module, processes: Processes) -> None:
    """Give all processes the first one's running statistics."""
    if processes.world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gather_objects(mine: Any, processes: Processes) -> list[Any]:
    """What each process has, in order; plain values and arrays."""
    if processes.world == 1:
        return [mine]
    every: list[Any] = [None] * processes.world
    dist.all_gather_object(every, mine)
    return every


def wait(processes: Processes) -> None:
    """Wait until all have come here."""
    if processes.world > 1:
        dist.barrier()
