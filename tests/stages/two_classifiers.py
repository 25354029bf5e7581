"""Started by torchrun in test_classification_distributed.py: runs in two processes, one by one."""

import json
import os
import signal
import sys

import torch

import classification
from utils import distributed

RANK = int(os.environ["RANK"])
train_step, label_losses = classification.train_step, classification.label_losses
calls = []


def spoiled_losses(*args):
    losses = label_losses(*args)
    if all(loss.requires_grad for loss in losses.values()):  # not in the validation
        calls.append(1)
        if RANK == 1 and len(calls) == 3:
            return {name: loss * float("nan") for name, loss in losses.items()}
    return losses


def stopped_step(*args):
    calls.append(1)
    if RANK == 1 and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(*args)


def main():
    torch.set_num_threads(1)
    for name in ("draw_inputs", "draw_progress"):
        setattr(classification, name, lambda *args: None)
    for change, expected, arguments in json.loads(sys.argv[1]):
        calls.clear()
        classification.label_losses = spoiled_losses if change == "spoil" else label_losses
        classification.train_step = stopped_step if change == "stop" else train_step
        assert classification.main(arguments) == expected, f"{change} {arguments}"
    distributed.leave(0)


if __name__ == "__main__":
    main()
