"""The classifier and its losses, against plain formulas; what freezing and padding must not do."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.classifier import (
    Classifier,
    RunningNorm,
    depth_of_parameters,
    label_losses,
    label_weights,
    optimizer_groups,
    pad,
)
from tests.models.test_backbones import SMALL, small

NAN = math.nan


def classifier(case="resunet", outputs=None, **options):
    backbone = small(case, decoder=False)
    return Classifier(backbone, outputs or {"a": 2, "b.c": 3, "type": 1}, **options)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---- forward


@pytest.mark.parametrize("case", SMALL)
def test_an_output_per_target_whatever_the_size(case):
    network = classifier(case, pooling="max" if case == "unet" else "meanmax").eval()
    outputs = network(images(2, 1, network.backbone.min_size - 1, 3, 1))
    shapes = {name: tuple(y.shape) for name, y in outputs.items()}
    assert shapes == {"a": (2, 2), "b.c": (2, 3), "type": (2, 1)}
    assert all((y == 0).all() for y in outputs.values())  # to begin with


def test_the_first_answer_is_the_share_of_each_class():
    network = classifier().eval()
    truth = {"a": torch.tensor([1, 0, 1, -1, 1]), "b.c": torch.tensor([0, 1, 2, 0, -1])}
    truth["type"] = torch.tensor([1.0, NAN, -1.0, 0.0, 0.0])
    drawn = torch.tensor([1.0, 1, 1, 1, 3])
    known = label_weights(truth, {"b.c": torch.tensor([1.0, 2.0, 2.0])})
    network.start_from(truth, {name: w * drawn for name, w in known.items()})
    outputs = network(images(2, 1, 8, 8, 8))
    expected = {"a": [1 / 6, 5 / 6], "b.c": [1 / 3, 1 / 3, 1 / 3]}
    for name, shares in expected.items():
        found = outputs[name].softmax(dim=1)
        torch.testing.assert_close(found, torch.tensor([shares] * 2))
    assert (outputs["type"] == 0).all()


def test_padding_is_zeros_on_both_sides():
    x = images(1, 1, 5, 8, 9)
    padded = pad(x, 4)
    assert padded.shape == (1, 1, 8, 8, 12)
    assert torch.equal(padded[:, :, 1:6, :, 1:10], x)
    assert (padded > 0).sum() == (x > 0).sum()
    assert pad(x, 1) is x


@pytest.mark.parametrize("case", SMALL)
def test_a_prediction_does_not_depend_on_what_shares_the_batch(case):
    network = classifier(case).eval()
    for head in network.heads:
        torch.nn.init.normal_(head.weight)
    x = images(2, 1, network.backbone.min_size, *[network.backbone.stride] * 2)
    together = network(x)["a"]
    alone = torch.cat([network(one[None])["a"] for one in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_bf16_reaches_the_backbone_and_not_the_heads():
    network = classifier()
    seen = []
    network.backbone.encoder.stem.convs[0].conv.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = network(images(2, 1, 8, 8, 8))
    assert seen == [torch.bfloat16] and outputs["a"].dtype == torch.float32


# ---- normalization of the features


def test_the_first_batch_is_normalised_by_itself():
    x = 5 + 0.1 * images(6, 4)
    norm = RunningNorm(4)
    expected = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    torch.testing.assert_close(norm(x), expected, rtol=0.02, atol=0.01)


def test_many_batches_of_one_are_normalised_by_all_of_them():
    x = 5 + 2 * torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    norm = RunningNorm(3, momentum=0.01)
    for one in x.split(1):
        norm(one)
    norm.eval()
    y, before = norm(x), {k: v.clone() for k, v in norm.state_dict().items()}
    assert y.mean(dim=0).abs().max() < 0.2 and (y.std(dim=0) - 1).abs().max() < 0.2
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())


def test_training_and_evaluation_are_one_function_of_the_statistics():
    norm, x = RunningNorm(4), images(6, 4)
    first = norm(x)
    torch.testing.assert_close(norm.eval()(x), first)
    assert torch.isfinite(RunningNorm(4)(images(1, 4))).all()


# ---- losses


def logits(n=7, k=3):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1), requires_grad=True)


def test_cross_entropy_as_written_out():
    z, y, smoothing = logits(), torch.tensor([0, 1, 2, -1, 1, -1, 0]), 0.1
    found = label_losses({"a": z}, {"a": y}, smoothing)["a"]
    for row, label, loss in zip(z.detach().double().numpy(), y.tolist(), found, strict=True):
        log_p = row - np.log(np.exp(row).sum())
        target = np.full(3, smoothing / 3)
        target[label] += 1 - smoothing
        assert loss.item() == pytest.approx(0 if label < 0 else -(target * log_p).sum(), rel=1e-5)


def test_smooth_l1_as_written_out():
    z, y = torch.tensor([[0.2], [3.0], [1.0]], requires_grad=True), torch.tensor([0.0, 0.5, NAN])
    found = label_losses({"n": z}, {"n": y}, 0.1)["n"]
    torch.testing.assert_close(found, torch.tensor([0.5 * 0.2**2, 2.5 - 0.5, 0.0]))
    found.sum().backward()
    torch.testing.assert_close(z.grad, torch.tensor([[0.2], [1.0], [0.0]]))


def test_without_smoothing_a_weighted_mean_is_torchs():
    z, y, w = logits(), torch.tensor([0, 1, 2, -1, 1, -1, 0]), torch.tensor([0.5, 2.0, 3.0])
    weights = label_weights({"a": y}, {"a": w})["a"]
    found = (label_losses({"a": z}, {"a": y}, 0.0)["a"] * weights).sum() / weights.sum()
    torch.testing.assert_close(found, F.cross_entropy(z, y, weight=w, ignore_index=-1))


def test_missing_labels_weigh_nothing_and_give_a_gradient_of_zero():
    z = {"a": logits(2, 3), "n": logits(2, 1)}
    truth = {"a": torch.tensor([-1, -1]), "n": torch.tensor([NAN, NAN])}
    weights = label_weights(truth, {})
    assert all((w == 0).all() for w in weights.values())
    losses = label_losses(z, truth, 0.1)
    sum((losses[name] * weights[name]).sum() for name in z).backward()
    assert all((y.grad == 0).all() for y in z.values())


# ---- freezing


@pytest.mark.parametrize("case", ["resunet", "segresnet ds"])
def test_a_frozen_backbone_gets_no_gradient_and_keeps_its_statistics(case):
    network = classifier(case)
    network.freeze(True)
    network.train()
    before = {k: v.clone() for k, v in network.backbone.state_dict().items()}
    network(images(2, 1, *[2 * network.backbone.stride] * 3))["a"].sum().backward()
    assert all(p.grad is None for p in network.backbone.parameters())
    assert network.heads[0].bias.grad is not None and network.norm.weight > 0
    assert all(torch.equal(before[k], v) for k, v in network.backbone.state_dict().items())
    network.freeze(False)
    torch.nn.init.ones_(network.heads[0].weight)
    network(images(2, 1, *[2 * network.backbone.stride] * 3))["a"][:, 0].sum().backward()
    assert all(p.grad is not None for p in network.backbone.parameters())
    moved = any(not torch.equal(before[k], v) for k, v in network.backbone.state_dict().items())
    assert moved == (case == "segresnet ds")  # which has running statistics


# ---- learning rates by depth


def test_depth_follows_the_stages():
    depth = depth_of_parameters(small("resunet", decoder=False))
    for name, found in depth.items():
        assert found == (int(name.split(".")[2]) if "stages" in name else 0), name
    depth = depth_of_parameters(small("unet", decoder=False, grad_checkpointing=True))
    stages = {"down_tr64": 0, "down_tr128": 1, "down_tr256": 2, "down_tr512": 3}
    assert all(found == stages[name.split(".")[0]] for name, found in depth.items())
    depth = depth_of_parameters(small("swinunetr", decoder=False))
    stages = {"patch_embed": 0, "layers1": 1, "layers2": 2, "layers3": 3, "layers4": 4}
    assert all(found == stages[name.split(".")[1]] for name, found in depth.items())


@pytest.mark.parametrize("case", SMALL)
def test_every_parameter_is_in_one_group_with_its_rate(case):
    network = classifier(case).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    groups = optimizer_groups(network, backbone_lr=0.1, layer_decay=0.5)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert network.backbone.training and all(p.grad is None for p in network.parameters())
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in network.parameters()}
    rate = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decayed = {id(p): group["decay"] for group in groups for p in group["params"]}
    assert all(rate[id(p)] == 1 for p in network.heads.parameters())
    depth, names = depth_of_parameters(network.backbone), dict(network.backbone.named_parameters())
    deepest = max(depth.values())
    for name, p in names.items():
        assert rate[id(p)] == pytest.approx(0.1 * 0.5 ** (deepest - depth[name])), name
    assert all(decayed[id(p)] == (p.ndim > 1) for p in network.parameters())
