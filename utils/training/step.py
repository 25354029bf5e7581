"""Small pieces that the training loops share."""

import itertools
import random

import numpy as np
import torch

from utils import distributed
from utils.errors import NotFinite

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def refuse_not_finite(patients: list[str]) -> None:
    """Raise NotFinite on all ranks if any rank has patients with such outputs; all call it."""
    found = list(dict.fromkeys(itertools.chain(*distributed.gather_objects(patients))))
    if found:
        raise NotFinite(f"the network's output is not finite for {', '.join(found)}")
