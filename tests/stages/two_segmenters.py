"""Started by torchrun in test_segmentation_distributed.py: runs in two processes, one by one."""

import json
import os
import signal
import sys

import torch

import segmentation
from utils import distributed

RANK = int(os.environ["RANK"])
supervised = segmentation.supervised


def supervised_with(after: int, action):
    """segmentation.supervised with `action` on rank 1 in its call number `after`."""
    calls = []

    def wrapped(outputs, targets):
        calls.append(1)
        losses = supervised(outputs, targets)
        return action(losses) if RANK == 1 and len(calls) == after + 1 else losses

    return wrapped


def stop(losses):
    os.kill(os.getpid(), signal.SIGTERM)
    return losses


def main():
    torch.set_num_threads(1)
    for name in ("draw_patches", "draw_case", "draw_progress"):
        setattr(segmentation, name, lambda *args: None)
    for change, expected, arguments in json.loads(sys.argv[1]):
        changes = {
            "": supervised,
            "spoil": supervised_with(2, lambda losses: losses * float("nan")),
            "stop": supervised_with(2, stop),
        }
        segmentation.supervised = changes[change]
        assert segmentation.main(arguments) == expected, f"{change} {arguments}"
    distributed.leave(0)


if __name__ == "__main__":
    main()
