"""Several processes, one for each GPU (torchrun). Every function is the identity on one process."""

import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(hours=24)  # the main rank may build a large cache while the others wait


def setup() -> torch.device:
    """Join the process group that torchrun describes, if any, and return this rank's device."""
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
        # torchrun may restart the processes with the store that the earlier ones wrote to
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start {restart}", store)
        options = {"store": store, "rank": rank, "world_size": world_size}
        dist.init_process_group(backend, timeout=PATIENCE, **options)
    return device


def teardown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End this process at once. If Python ends it, a thread of gloo sometimes still needs the
    interpreter and aborts, and torchrun then takes a finished run for a failed one."""
    teardown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap(module: nn.Module, find_unused_parameters: bool = False) -> nn.Module:
    """Return a module whose gradients are means over the processes; buffers stay each one's own."""
    if world_size() == 1:
        return module
    options = {"broadcast_buffers": False, "find_unused_parameters": find_unused_parameters}
    with warnings.catch_warnings():  # what is to come in its place exchanges buffers at the start
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(module, **options)


def is_main() -> bool:
    return rank() == 0


def no_bar() -> bool | None:
    """Return tqdm's `disable`: bars are shown by the main process, and on a terminal alone, as in a
    file each of their updates is a line."""
    return None if is_main() else True


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Return sum, mean or max over ranks, without gradient; on one process the tensor itself."""
    if world_size() == 1:
        return tensor
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return tensor / world_size() if op == "mean" else tensor


def gather_objects(value) -> list:
    """Return the values of all ranks, in rank order; they must be small and picklable."""
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
    """Return the sum over ranks; gradients flow back to every rank."""
    return tensor if world_size() == 1 else _SumOverRanks.apply(tensor)


def concat_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate (B, ...) of all ranks to (world_size * B, ...), with gradients, for equal B."""
    if world_size() == 1:
        return tensor
    # each rank fills its own slot and leaves zeros elsewhere, so the sum is the concatenation
    slots = [torch.zeros_like(tensor)] * world_size()
    slots[rank()] = tensor
    return sum_over_ranks(torch.stack(slots)).flatten(0, 1)
