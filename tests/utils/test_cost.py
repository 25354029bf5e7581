"""What a network costs, against numbers that were worked out by hand."""

import torch
from torch import nn

from utils.cost import cost_of


class Plain(nn.Module):
    """Two convolutions with a ReLU between."""

    stride = 1

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.last = nn.Conv3d(4, 8, 1)

    def encode(self, x):
        return [self.last(torch.relu(self.first(x)))]

    def decode_all(self, x, maps):
        return [torch.relu(maps[0])]


def test_operations_and_what_is_kept_are_counted():
    parameters = 4 * 27 + 4 + 4 * 8 + 8
    # a multiplication and an addition per weight; the image and the ReLU's output are kept
    assert cost_of(Plain(), 1, False) == (parameters, 1, 2 * (4 * 27 + 4 * 8), 1 + 4)
    assert cost_of(Plain(), 1, True).kept == 1 + 4 + 8
