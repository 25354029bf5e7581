"""What all backbones have in common: shapes, sizes, gradients, copies, memory, precision."""

import copy
import json
from functools import partial

import pytest
import torch

from models.backbones import build_backbone, facts_of, from_config
from tests.places import ROOT
from utils.config.command_line import parse_command_line
from utils.config.dino import DinoConfig, impossible_dino
from utils.config.schema import impossible_size

CONFIG = ROOT / "dino_config.yaml"

SMALL = {
    "resunet": {"features": (4, 8, 12), "blocks": (1, 2, 2)},
    "swinunetr": {"feature_size": 12},
    "swinunetr v2": {"feature_size": 12, "use_v2": True},
    "unet": {"feature_size": 4},
    "segresnet": {"feature_size": 8, "blocks": (1, 2, 1)},
    "segresnet ds": {"variant": "ds", "feature_size": 8, "blocks": (1, 2, 1)},
}
ENCODER = {  # what the names of its tensors begin with
    "resunet": "encoder.",
    "swinunetr": "swinViT.",
    "swinunetr v2": "swinViT.",
    "unet": "down_tr",
    "segresnet": ("convInit.", "down_layers."),
    "segresnet ds": "encoder.",
}


def small(case, decoder=True, **options):
    torch.manual_seed(0)
    return build_backbone(case.split()[0], decoder=decoder, **SMALL[case], **options)


def image(backbone):
    """As small as can be: one or two voxels in the deepest map."""
    size = (backbone.min_size, backbone.stride, backbone.stride)
    return torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0))


def gradients(backbone, outputs):
    """Parameter gradients of a fixed nonlinear function of the outputs."""
    sum((out * out.detach().cos()).sum() for out in outputs).backward()
    return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


def test_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="'vit'.*resunet, swinunetr, unet, segresnet"):
        build_backbone("vit")


@pytest.mark.parametrize(
    "name, options",
    [
        ("resunet", {"features": (4, 8), "blocks": (1,)}),
        ("resunet", {"features": (4,), "blocks": (1,)}),
        ("resunet", {"features": (4, 8), "blocks": (1, 0)}),
        ("swinunetr", {"feature_size": 20}),
        ("unet", {"feature_size": 5}),
        ("segresnet", {"variant": "vae"}),
        ("segresnet", {"feature_size": 12}),
        ("segresnet", {"blocks": (4,)}),
    ],
)
def test_impossible_options_are_refused(name, options):
    with pytest.raises(ValueError, match=name):
        build_backbone(name, **options)


@pytest.mark.parametrize("case", SMALL)
@torch.no_grad()
def test_shapes(case):
    backbone = small(case)
    x = torch.rand(2, 1, backbone.min_size, backbone.stride, 2 * backbone.stride)
    maps = backbone.encode(x)
    assert backbone.strides == sorted(backbone.strides)
    for map_, channels, stride in zip(
        maps, backbone.feature_channels, backbone.strides, strict=True
    ):
        assert map_.shape == (2, channels, *(size // stride for size in x.shape[2:]))
    decoded = backbone.decode_all(x, maps)
    for i, (map_, channels) in enumerate(zip(decoded, backbone.decoder_channels, strict=True)):
        assert map_.shape == (2, channels, *(size // 2**i for size in x.shape[2:]))
    assert backbone.stride == backbone.strides[-1] == max(backbone.strides)
    with pytest.raises(ValueError, match="not divisible"):
        backbone.encode(x[..., :-1])
    with pytest.raises(ValueError, match=r"expected \(B, C, X, Y, Z\), got .* \(1, "):
        backbone.encode(x[0])


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("decoder", [False, True])
@torch.no_grad()
def test_min_size_is_the_smallest_that_runs(case, decoder):
    def run(size):
        x = torch.rand(1, 1, size, size, size)
        features = backbone.encode(x)
        if decoder:
            backbone.decode(x, features)

    backbone = small(case, decoder=decoder)
    run(backbone.min_size)
    if backbone.min_size > backbone.stride:
        with pytest.raises(ValueError, match="Expected more than 1"):
            run(backbone.min_size - backbone.stride)


@pytest.mark.parametrize("case", SMALL)
@torch.no_grad()
def test_encoder_alone_has_the_encoder_of_the_whole(case):
    whole, encoder = small(case), small(case, decoder=False)
    tensors = whole.state_dict().items()
    expected = {k: v.shape for k, v in tensors if k.startswith(ENCODER[case])}
    assert {k: v.shape for k, v in encoder.state_dict().items()} == expected
    encoder.load_state_dict({k: whole.state_dict()[k] for k in expected})
    x = image(encoder)
    for a, b in zip(whole.encode(x), encoder.encode(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("case", SMALL)
def test_grad_checkpointing_changes_no_number(case):
    plain, saving = small(case), small(case, grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x = image(plain)
    results = []
    for backbone in (plain, saving):
        maps = backbone.encode(x)
        decoded = backbone.decode_all(x, maps)
        results.append(([*maps, *decoded], gradients(backbone, decoded[:1])))
    (outputs, grads), (saving_outputs, saving_grads) = results
    for a, b in zip(outputs, saving_outputs, strict=True):
        torch.testing.assert_close(a, b)
    assert grads.keys() == saving_grads.keys() == dict(plain.named_parameters()).keys()  # no unused
    for name in grads:
        torch.testing.assert_close(grads[name], saving_grads[name], msg=lambda m, n=name: n + m)
    for (name, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("case", SMALL)
def test_the_deepest_map_uses_every_parameter(case):
    """It is all that DINO needs to pool, and DDP waits for every gradient."""
    backbone = small(case, decoder=False)
    grads = gradients(backbone, backbone.encode(image(backbone))[-1:])
    assert grads.keys() == dict(backbone.named_parameters()).keys()


@pytest.mark.parametrize("case", SMALL)
def test_bf16_autocast(case):
    backbone = small(case)
    x = image(backbone)
    with torch.no_grad():
        exact = backbone.encode(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = backbone.encode(x)
            decoded = backbone.decode(x, maps)
    assert decoded.isfinite().all()
    for a, b in zip(exact, maps, strict=True):
        assert (a - b.float()).abs().mean() < 0.05 * a.std()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients(backbone, backbone.encode(x))


@pytest.mark.parametrize("case", SMALL)
@torch.no_grad()
def test_a_copy_shares_no_storage(case):
    backbone = small(case, decoder=False, grad_checkpointing=True)
    twin = copy.deepcopy(backbone)
    for p in twin.parameters():
        p.zero_()
    x = image(backbone)
    assert backbone.encode(x)[-1].std() > 0
    assert twin.encode(x)[-1].abs().max() == 0


def test_inference_mode_leaves_training_alone():
    """The window mask is cached: one made in inference mode must serve training too."""
    backbone = small("swinunetr", decoder=False)
    x = torch.rand(1, 1, 64, 96, 32)  # a size of its own, so that the mask is made here
    with torch.inference_mode():
        expected = backbone.encode(x)
    maps = backbone.encode(x)
    gradients(backbone, maps)
    torch.testing.assert_close(maps[-1], expected[-1].clone(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", [case for case in SMALL if case != "swinunetr"])  # part of v2
def test_traces_into_one_graph(case):
    """torch.compile meets nothing that breaks the graph (dynamic sizes trace for minutes)."""
    saving = case != "segresnet ds"  # there, recomputing must not move the running statistics
    backbone = small(case, decoder=False, grad_checkpointing=saving)
    x = image(backbone)
    compiled = torch.compile(backbone.encode, backend="eager", fullgraph=True, dynamic=False)
    for a, b in zip(compiled(x), backbone.encode(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "backbone, options",
    [
        ("resunet", {"features": [4, 8, 12], "blocks": [1, 2, 2]}),
        ("swinunetr", {"feature_size": 12, "use_v2": False}),
        ("unet", {"feature_size": 4}),
        ("segresnet", {"variant": "standard", "feature_size": 8, "blocks": None}),
        ("segresnet", {"variant": "standard", "feature_size": 8, "blocks": [1, 1]}),
        ("segresnet", {"variant": "ds", "feature_size": 8, "blocks": None}),
        ("segresnet", {"variant": "ds", "feature_size": 8, "blocks": [1, 1]}),
    ],
)
def test_the_config_knows_what_a_backbone_takes(backbone, options):
    overrides = [f"{backbone}.{key}={json.dumps(value)}" for key, value in options.items()]
    argv = [f"backbone={backbone}", "dino.patch_level=1", *overrides]
    cfg, _ = parse_command_line(
        argv, CONFIG, DinoConfig, partial(impossible_dino, facts_of=facts_of)
    )
    values = {"backbone": backbone} | {f"{backbone}.{k}": v for k, v in options.items()}
    for decoder in (False, True):
        built = from_config(cfg, decoder)
        facts = facts_of(values, decoder)
        assert facts.strides == built.strides and len(built.feature_channels) == len(facts.strides)
        for size in (built.stride, 2 * built.stride):
            wrong = list(impossible_size("x", values | {"x": [size] * 3}, facts))
            assert bool(wrong) == (size < built.min_size)


def test_resunet_starts_with_he_weights_and_all_branches_in_use():
    backbone = small("resunet")
    block = backbone.encoder["stages"][1]["blocks"][0]
    assert block.conv2.norm.weight.eq(1).all() and block.conv1.norm.weight.eq(1).all()
    assert not block.conv1.conv.bias.any()
    fan_in = block.conv2.conv.weight[0].numel()
    assert abs(block.conv2.conv.weight.std() * (fan_in / 2) ** 0.5 - 1) < 0.05
