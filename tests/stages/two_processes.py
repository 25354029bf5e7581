"""Started by torchrun in test_dino_distributed.py: runs of dino.py in two processes, one by one."""

import json
import os
import signal
import sys

import torch

import dino
from utils import distributed

RANK = int(os.environ["RANK"])
forward = dino.forward


def forward_with(after: int, action):
    """dino.forward with `action` on what it returns, on rank 1 in its call number `after`."""
    calls = []

    def wrapped(student, *args):
        out, features = forward(student, *args)
        if student.training:
            calls.append(1)
            if RANK == 1 and len(calls) == after + 1:
                action(out)
        return out, features

    return wrapped


def spoil(out):
    out["loss"] = out["loss"] * float("nan")


def stop(out):
    os.kill(os.getpid(), signal.SIGTERM)


def main():
    torch.set_num_threads(1)
    for name in ("draw_crops", "draw_progress"):
        setattr(dino, name, lambda *args: None)
    changes = {"": forward, "spoil": forward_with(5, spoil), "stop": forward_with(5, stop)}
    for change, expected, arguments in json.loads(sys.argv[1]):
        dino.forward = changes[change]
        assert dino.main(arguments) == expected, f"{change} {arguments}"
    distributed.leave(0)


if __name__ == "__main__":
    main()
