"""Several processes, one per GPU (torchrun). Every function is the identity on one process."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(hours=24)  # the main rank may build a large cache while the others wait


def setup() -> torch.device:
    """Join the process group that torchrun describes, if any; return this rank's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif torch.backends.mps.is_available():
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store, rank, world_size = next(dist.rendezvous("env://", timeout=PATIENCE))
        # torchrun may start the processes again with the store that those before them wrote to
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start {restart}", store)
        options = {"store": store, "rank": rank, "world_size": world_size}
        dist.init_process_group(backend, timeout=PATIENCE, **options)
    return device


def teardown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End this process at once. Python's own end now and then aborts in a thread of gloo that still
    wants the interpreter, and torchrun then takes a finished run for a failed one."""
    teardown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Sum, mean or max over ranks, without gradient. Returns a new tensor."""
    if world_size() == 1:
        return tensor
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return tensor / world_size() if op == "mean" else tensor


def gather_objects(value) -> list:
    """The value of every rank, in rank order, on every rank. Values must be picklable and small."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return all_reduce(tensor)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks through which gradients flow back to every rank."""
    return tensor if world_size() == 1 else _SumOverRanks.apply(tensor)


def concat_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """(B, ...) of each rank -> (world_size * B, ...) with gradients; B is equal on all ranks."""
    if world_size() == 1:
        return tensor
    # Each rank fills its own slot and leaves zeros elsewhere: the sum is the concatenation.
    slots = [torch.zeros_like(tensor)] * world_size()
    slots[rank()] = tensor
    return sum_over_ranks(torch.stack(slots)).flatten(0, 1)
