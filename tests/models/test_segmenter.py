"""The segmenter and its loss against MONAI's, plain formulas, and what batches must not change."""

import numpy as np
import pytest
import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss, DiceLoss

import models.segmenter
from models.backbones import build_backbone
from models.segmenter import (
    Segmenter,
    dice_ce,
    loss_of,
    marginal_dice_ce,
    optimizer_groups,
    supervised,
)
from utils.classes import IGNORE, Classes
from utils.weights import load_backbone

TINY = {
    "resunet": {"features": [4, 6, 8], "blocks": [1, 1, 1]},
    "swinunetr": {"feature_size": 12},
    "unet": {"feature_size": 4},
    "segresnet": {"feature_size": 8},
}
DS = {"variant": "ds", "feature_size": 8, "blocks": [1, 1, 1]}
SIZES = dict.fromkeys(TINY, (16, 16, 16)) | {"swinunetr": (64, 32, 32)}


def segmenter(name="resunet", num_classes=3, deep_supervision=False, **options):
    torch.manual_seed(0)
    backbone = build_backbone(name, decoder=True, **(options or TINY[name]))
    return Segmenter(backbone, num_classes, deep_supervision)


def some(num_classes=3, batch=2, size=8, seed=0):
    """Logits, and a target of smooth blobs with all classes in each patch."""
    torch.manual_seed(seed)
    logits = torch.randn(batch, num_classes, size, size, size, requires_grad=True)
    target = torch.randint(0, num_classes, (batch, 2, 2, 2), dtype=torch.uint8)
    target[:, 0, 0] = torch.tensor([1, 2])
    return logits, target.repeat_interleave(size // 2, 1).repeat_interleave(
        size // 2, 2
    ).repeat_interleave(size // 2, 3)


# ---- the network


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("deep", [False, True])
def test_every_backbone_gives_logits_and_gradients(name, deep):
    network, size = segmenter(name, deep_supervision=deep), SIZES[name]
    x = torch.rand(1, 1, *size)
    out = network(x)
    maps = out if deep else [out]
    assert len(maps) == (len(network.backbone.decoder_channels) if deep else 1) > deep
    for i, logits in enumerate(maps):
        assert logits.shape == (1, 3, *[n // 2**i for n in size])
    target = torch.randint(0, 3, (1, *size), dtype=torch.uint8)
    supervised(out, target).sum().backward()
    # DDP would wait for ever for those without
    without = [n for n, p in network.named_parameters() if p.grad is None]
    assert without == []
    evaluated = network.eval()(x)
    assert isinstance(evaluated, torch.Tensor) and evaluated.shape == maps[0].shape


@pytest.mark.parametrize("name", TINY)
def test_the_first_answers_are_near_the_shares_of_the_classes(name):
    network, shares = segmenter(name, deep_supervision=True), np.array([0.96, 0.03, 0.01])
    state, weights = torch.get_rng_state(), [o.weight.clone() for o in network.outputs]
    network.start_from(shares)
    assert torch.equal(torch.get_rng_state(), state)
    for output, weight, logits in zip(
        network.outputs, weights, network(torch.rand(1, 1, *SIZES[name])), strict=True
    ):
        torch.testing.assert_close(output.bias.softmax(0), torch.tensor(shares).float())
        assert torch.equal(output.weight, weight)
        found = logits.softmax(1).mean(dim=(0, 2, 3, 4))
        assert 0.9 < found[0] < 0.99


@pytest.mark.parametrize(
    ("name", "deep", "overlap"),
    [("resunet", True, False), ("unet", False, False), ("segresnet", True, True)],
)
def test_fitted_outputs_are_where_their_loss_is_least_and_all_else_stays(
    name, deep, overlap, monkeypatch
):
    """Steepest descent finds nothing better, nor does a fit from elsewhere; on some voxels too."""
    monkeypatch.setattr(models.segmenter, "FIT_VOXELS", 2000)
    names = {"a": [1, 2], "b": [2]} if overlap else {"a": 1, "b": 2}
    classes = Classes.from_config(names)
    network = segmenter(name, classes.num_outputs, deep)
    known = torch.ones(1, classes.num_outputs, dtype=torch.bool)
    target = some(size=SIZES[name][0])[1]
    images = torch.rand(2, 1, *SIZES[name]) + target[:, None]
    patches = [(x[None], t[None], known) for x, t in zip(images, target, strict=True)]
    before = {k: v.clone() for k, v in network.state_dict().items()}
    first, least = network.fit_outputs(patches, classes)
    assert least < first
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith("outputs."), key

    with torch.no_grad():
        for output in network.outputs:
            output.bias.add_(1.0)
    assert network.fit_outputs(patches, classes)[1] == pytest.approx(least, abs=0.02)
    logits = network(images)
    logits = logits[0] if deep else logits
    parts = loss_of(classes, known.expand(2, -1))
    loss = parts(logits, target).sum()
    assert loss.item() == pytest.approx(least, abs=0.1)  # of all voxels, without the penalty
    grads = torch.autograd.grad(loss, [network.outputs[0].bias])
    assert torch.cat(grads).norm() < 0.1
    network.fit_outputs(patches, classes, (0.0, 1.0))  # what it then leaves out of Dice it gains
    other = network(images)
    assert parts(other[0] if deep else other, target)[1] < parts(logits, target)[1]


def test_outputs_stay_as_they_are_where_maps_are_not_finite():
    """A patch that overflows must not spoil all steps to come."""
    network, target = segmenter(), some(size=16)[1]
    before = [p.clone() for p in network.outputs.parameters()]
    known = torch.ones(1, 3, dtype=torch.bool)
    image = torch.full((1, 1, 16, 16, 16), torch.inf)
    network.fit_outputs([(image, target[:1], known)], Classes.from_config({"a": 1, "b": 2}))
    assert all(map(torch.equal, before, network.outputs.parameters()))


@pytest.mark.parametrize("name", ["resunet", "unet", "segresnet"])
def test_the_logits_of_a_patch_do_not_depend_on_its_batch(name):
    network = segmenter(name)
    x = torch.rand(3, 1, *SIZES[name]) * torch.tensor([1, 5, 20.0]).view(3, 1, 1, 1, 1)
    for training in (True, False):
        network.train(training)
        torch.testing.assert_close(network(x)[1:2], network(x[1:2]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), [*TINY.items(), ("segresnet", DS)])
def test_a_frozen_encoder_does_not_move_and_what_is_not_it_does(name, options):
    network, size = segmenter(name, **options), SIZES[name]
    network.freeze(True)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    encoder = {f"backbone.{k}" for k in build_backbone(name, decoder=False, **options).state_dict()}
    target = torch.randint(0, 3, (1, *size), dtype=torch.uint8)
    supervised(network(torch.rand(1, 1, *size)), target).sum().backward()
    trained = {k for k, p in network.named_parameters() if p.grad is not None}
    assert trained == {k for k, _ in network.named_parameters()} - encoder
    for key in encoder - {"backbone.merge_order"}:  # running statistics too
        assert torch.equal(network.state_dict()[key], before[key])
    network.freeze(False)
    assert all(p.requires_grad for p in network.parameters())
    assert all(m.training for m in network.modules())


@pytest.mark.parametrize(("name", "options"), [*TINY.items(), ("segresnet", DS)])
def test_optimizer_groups_hold_each_parameter_once_and_scale_the_encoder(name, options):
    network = segmenter(name, **options)
    encoder = build_backbone(name, decoder=False, **options)
    scale_of = {}
    for group in optimizer_groups(network, encoder_lr=0.1):
        for p in group["params"]:
            assert id(p) not in scale_of
            scale_of[id(p)] = group["lr_scale"]
            assert group["decay"] == (p.ndim > 1)
    own = {f"backbone.{k}" for k, _ in encoder.named_parameters()}
    for key, p in network.named_parameters():
        assert scale_of[id(p)] == (0.1 if key in own else 1.0), key
    assert len(scale_of) == len(list(network.parameters()))


def test_a_segmenter_starts_from_a_segmenter(tmp_path):
    one, two = segmenter(num_classes=3), segmenter(num_classes=5)
    for p in one.parameters():
        torch.nn.init.normal_(p)
    path = tmp_path / "best.pt"
    torch.save({"modules": {"segmenter": one.state_dict()}}, path)
    report = load_backbone(two.backbone, path)
    assert report.encoder[0] == report.encoder[1] and report.decoder[0] == report.decoder[1]
    for key, value in one.backbone.state_dict().items():
        assert torch.equal(two.backbone.state_dict()[key], value)


# ---- the loss


def test_the_loss_is_monais():
    logits, target = some()
    expected = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    torch.testing.assert_close(dice_ce(logits, target).sum(), expected(logits, target[:, None]))


def test_deep_supervision_is_monais_with_weights_that_sum_to_one():
    logits, target = some(size=8)
    maps = [logits, logits[..., ::2, ::2, ::2] * 2, logits[..., ::4, ::4, ::4] * 3]
    plain = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    expected = DeepSupervisionLoss(plain)(maps, target[:, None].float()) / 1.75
    torch.testing.assert_close(supervised(maps, target).sum(), expected)
    torch.testing.assert_close(supervised(logits, target), dice_ce(logits, target))


def test_ignored_voxels_count_nowhere():
    logits, target = some()
    target[0, :, :, :3], target[1, 4:] = IGNORE, IGNORE
    losses = dice_ce(logits, target)
    losses.sum().backward()
    ignored = (target == IGNORE)[:, None].expand_as(logits)
    assert logits.grad[ignored].abs().max() == 0 and logits.grad[~ignored].abs().min() > 0
    # as if those voxels were not there
    parts = [(logits[:1, ..., 3:], target[:1, ..., 3:]), (logits[1:, :, :4], target[1:, :4])]
    torch.testing.assert_close(losses, torch.stack([dice_ce(*p) for p in parts]).mean(0))


@pytest.mark.parametrize("value", [0, IGNORE])
def test_patches_without_a_class_or_without_anything_are_fine(value):
    logits, target = some()
    target[0] = value
    losses = dice_ce(logits, target)
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(logits.grad).all()
    if value == IGNORE:
        assert logits.grad[0].abs().max() == 0


def test_a_perfect_answer_costs_nothing_whatever_the_precision():
    _, target = some()
    perfect = torch.nn.functional.one_hot(target.long(), 3).movedim(-1, 1) * 100.0
    for dtype in (torch.float32, torch.bfloat16):
        losses = dice_ce(perfect.to(dtype), target)
        assert losses.dtype == torch.float32 and losses.abs().max() < 1e-5


def test_the_loss_of_a_batch_is_the_mean_of_its_halves():
    """Also where patches have different numbers of ignored voxels: ranks divide a batch."""
    logits, target = some(batch=4)
    target[1, :5], target[2, :, :7] = IGNORE, IGNORE
    halves = [dice_ce(logits[i : i + 2], target[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(dice_ce(logits, target), torch.stack(halves).mean(0))


# ---- regions that overlap

TWO = Classes.from_config({"a": 1, "b": 2})
BRATS = Classes.from_config({"WT": [1, 2, 4], "TC": [1, 4], "ET": 4})  # indices 1: 2, 2: 1, 3: 4


def test_the_loss_of_regions_is_monais_with_a_sigmoid_each():
    logits, target = some()
    target[:, 4:] += target[:, 4:] > 0  # all of the values
    regions = torch.stack([target >= 1, target >= 2, target >= 3], dim=1).float()
    loss = loss_of(BRATS, torch.ones(2, 3, dtype=torch.bool))
    dice, bce = DiceLoss(sigmoid=True), torch.nn.BCEWithLogitsLoss()
    expected = torch.stack([dice(logits, regions), bce(logits, regions)])
    torch.testing.assert_close(loss(logits, target), expected)
    deep = supervised([logits, logits[..., ::2, ::2, ::2]], target, loss)
    assert torch.isfinite(deep).all()
    assert loss_of(TWO, torch.ones(2, 3, dtype=torch.bool)) is dice_ce


def test_ignored_voxels_count_in_no_region():
    logits, target = some()
    target[0, :, :, :3], target[1, 4:] = IGNORE, IGNORE
    loss = loss_of(BRATS, torch.ones(1, 3, dtype=torch.bool))
    losses = loss(logits, target)
    losses.sum().backward()
    ignored = (target == IGNORE)[:, None].expand_as(logits)
    assert logits.grad[ignored].abs().max() == 0 and logits.grad[~ignored].abs().min() > 0
    parts = [(logits[:1, ..., 3:], target[:1, ..., 3:]), (logits[1:, :, :4], target[1:, :4])]
    torch.testing.assert_close(losses, torch.stack([loss(*p) for p in parts]).mean(0))


def test_the_first_answers_of_regions_are_their_shares():
    network, shares = segmenter(), np.array([0.3, 0.03, 0.01])
    network.start_from(shares, overlap=True)
    torch.testing.assert_close(network.outputs[0].bias.sigmoid(), torch.tensor(shares).float())


# ---- not all classes labelled


def test_unlabelled_classes_are_merged_with_the_background():
    """Against the formula of the marginal loss, voxel by voxel."""
    logits, target = some()
    target[1] = torch.where(target[1] == 2, 0, target[1])
    target[0, :, :, :3] = IGNORE
    known = torch.tensor([[True, True, True], [True, True, False]])
    losses = loss_of(TWO, known)(logits, target)
    whole = dice_ce(logits[:1], target[:1])
    p = logits[1].softmax(0)
    q = torch.stack([p[0] + p[2], p[1]])
    ce = -torch.where(target[1] == 1, q[1], q[0]).log().mean()
    inside = target[1] == 1
    dice = 1 - 2 * (q[1] * inside).sum() / (q[1].sum() + inside.sum())
    torch.testing.assert_close(losses, (whole + torch.stack([dice, ce])) / 2, atol=1e-5, rtol=1e-4)
    losses.sum().backward()
    assert torch.isfinite(logits.grad).all()
    torch.testing.assert_close(
        marginal_dice_ce(logits, target, known | True), dice_ce(logits, target)
    )


def test_a_region_that_is_not_labelled_gets_no_gradient():
    logits, target = some()
    known = torch.tensor([[True, True, True], [True, False, True]])
    losses = loss_of(BRATS, known)(logits, target)
    losses.sum().backward()
    assert logits.grad[1, 1].abs().max() == 0 and logits.grad[1, 2].abs().min() > 0
    first = loss_of(BRATS, known[:1])(logits[:1], target[:1])
    torch.testing.assert_close(losses[1], (first[1] + _bce(logits[1], target[1])) / 2)


def _bce(logits, target):
    """Mean binary cross-entropy of the first and the last region."""
    wanted = torch.stack([target >= 1, target >= 3]).float()
    return torch.nn.functional.binary_cross_entropy_with_logits(logits[::2], wanted)
