"""When memory runs out: parts of batches, and errors that help."""

from types import SimpleNamespace

import pytest
import torch

from utils.errors import RunError
from utils.memory import explained, in_parts


def device_for(most):
    """A function of batches that has room for `most`."""

    def total(batch):
        x = batch["x"] if isinstance(batch, dict) else batch
        if len(x) > most:
            raise torch.OutOfMemoryError
        return x.sum()

    return total


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_nothing_is_left_out_or_seen_twice(most):
    said, batches = [], [torch.arange(8.0), torch.arange(8.0, 16), torch.arange(16.0, 19)]
    found = list(in_parts(device_for(most), batches, said.append))
    assert torch.cat([part for part, _ in found]).tolist() == list(range(19))
    assert all(total == part.sum() for part, total in found)
    assert len(said) == {1: 3, 2: 2, 3: 2, 8: 0}[most]  # the size is remembered: 4, 2, 1


def test_a_batch_is_cut_with_all_that_is_in_it():
    batch = {"index": torch.arange(3), "x": torch.ones(3, 2), "views": {"matrix": torch.eye(3)}}
    batch["mask"] = ["a", "b", "c"]
    parts = [part for part, _ in in_parts(device_for(1), [batch], lambda text: None)]
    assert [part["mask"] for part in parts] == [["a"], ["b"], ["c"]]
    assert torch.equal(torch.cat([part["views"]["matrix"] for part in parts]), torch.eye(3))


def test_not_even_one_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        list(in_parts(device_for(0), [torch.ones(4)], lambda text: None))


def test_the_error_says_what_helps():
    settings = {"batch_size": 6, "accumulate": 2, "grad_checkpointing": False, "backbone": "unet"}
    cfg = SimpleNamespace(precision="fp32", image=SimpleNamespace(size=(8, 9, 10)), **settings)
    with pytest.raises(RunError) as caught, explained("a training step", cfg):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
    text = str(caught.value)
    assert "a training step" in text and "6 x 8 x 9 x 10" in text and "more" not in text
    assert "batch_size=3 with accumulate=4, grad_checkpointing=true" in text
    with pytest.raises(ValueError), explained("a training step", cfg):
        raise ValueError
