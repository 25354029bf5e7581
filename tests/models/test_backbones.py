"""The backbones agree with the published networks, in names, shapes and numbers."""

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR
from monai.networks.nets.swin_unetr import WindowAttention, compute_mask
from torch.nn.functional import conv3d

from models.backbones import build_backbone
from models.swinunetr import FusedWindowAttention

SHARED = Path(__file__).parents[3] / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "references").exists(), reason="no reference outputs in ../shared/references"
)
SMALL = {
    "resunet": {"features": (4, 8, 12), "blocks": (1, 2, 2)},
    "swinunetr": {"feature_size": 12},
    "swinunetr v2": {"feature_size": 12, "use_v2": True},
}


def small(case, decoder=True, **options):
    torch.manual_seed(0)
    return build_backbone(case.split()[0], decoder=decoder, **SMALL[case], **options)


def image(backbone, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (backbone.min_size, backbone.min_size, backbone.min_size + backbone.stride)
    return torch.rand(batch, 1, *size, generator=generator)


def gradients(backbone, outputs):
    """Parameter gradients of a fixed nonlinear function of the outputs."""
    sum((out * out.detach().cos()).sum() for out in outputs).backward()
    return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


def load_formula():
    spec = importlib.util.spec_from_file_location("formula", SHARED / "references" / "formula.py")
    formula = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(formula)
    return formula


def assert_agrees(ours, reference):
    """Agreement to 1e-4 of the reference's standard deviation."""
    error = np.abs(ours.detach().numpy() - reference).max() / reference.std()
    assert error < 1e-4, error


def test_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="'vit'.*resunet, swinunetr"):
        build_backbone("vit")


@pytest.mark.parametrize(
    "name, options",
    [
        ("resunet", {"features": (4, 8), "blocks": (1,)}),
        ("resunet", {"features": (4,), "blocks": (1,)}),
        ("resunet", {"features": (4, 8), "blocks": (1, 0)}),
        ("swinunetr", {"feature_size": 20}),
    ],
)
def test_impossible_options_are_refused(name, options):
    with pytest.raises(ValueError, match=name):
        build_backbone(name, **options)


@pytest.mark.parametrize("case", SMALL)
def test_shapes(case):
    backbone = small(case)
    x = image(backbone, batch=2)
    maps = backbone.encode(x)
    for map_, channels, stride in zip(
        maps, backbone.feature_channels, backbone.strides, strict=True
    ):
        assert map_.shape == (2, channels, *(size // stride for size in x.shape[2:]))
    decoded = backbone.decode(x, maps)
    assert decoded.shape == (2, backbone.feature_channels[0], *x.shape[2:])
    assert backbone.stride == max(backbone.strides)
    with pytest.raises(ValueError, match="not divisible"):
        backbone.encode(x[..., :-1])


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("decoder", [False, True])
def test_min_size_is_the_smallest_that_runs(case, decoder):
    def run(size):
        x = torch.rand(1, 1, size, size, size)
        features = backbone.encode(x)
        if decoder:
            backbone.decode(x, features)

    backbone = small(case, decoder=decoder)
    run(backbone.min_size)
    if backbone.min_size > backbone.stride:
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            run(backbone.min_size - backbone.stride)


@pytest.mark.parametrize("case", SMALL)
def test_encoder_alone_has_the_encoder_of_the_whole(case):
    whole, encoder = small(case), small(case, decoder=False)
    part = "encoder." if case == "resunet" else "swinViT."
    expected = {k: v.shape for k, v in whole.state_dict().items() if k.startswith(part)}
    assert {k: v.shape for k, v in encoder.state_dict().items()} == expected
    encoder.load_state_dict({k: whole.state_dict()[k] for k in expected})
    x = image(whole)
    for a, b in zip(whole.encode(x), encoder.encode(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("case", SMALL)
def test_grad_checkpointing_changes_no_number(case):
    plain, saving = small(case), small(case, grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x = image(plain)[..., : plain.min_size]
    results = []
    for backbone in (plain, saving):
        maps = backbone.encode(x)
        outputs = [*maps, backbone.decode(x, maps)]
        results.append((outputs, gradients(backbone, outputs)))
    (outputs, grads), (saving_outputs, saving_grads) = results
    for a, b in zip(outputs, saving_outputs, strict=True):
        torch.testing.assert_close(a, b)
    assert grads.keys() == saving_grads.keys() == dict(plain.named_parameters()).keys()
    for name in grads:
        torch.testing.assert_close(grads[name], saving_grads[name], msg=lambda m, n=name: n + m)


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
def test_a_copy_shares_no_storage(case):
    backbone = small(case, decoder=False, grad_checkpointing=True)
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    x = image(backbone)
    assert backbone.encode(x)[-1].std() > 0
    assert twin.encode(x)[-1].abs().max() == 0


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_window_attention_is_monais(masked, grad):
    torch.manual_seed(0)
    monai = WindowAttention(24, num_heads=3, window_size=(3, 3, 3), qkv_bias=True)
    monai.relative_position_bias_table.data.normal_(std=0.5)  # starts near 0, which hides mistakes
    ours = FusedWindowAttention(24, num_heads=3, window_size=(3, 3, 3), qkv_bias=True)
    ours.load_state_dict(monai.state_dict())
    x = torch.randn(2 * 8, 27, 24, requires_grad=True)  # 2 images of 8 windows
    mask = compute_mask([6, 6, 6], (3, 3, 3), (1, 1, 1), "cpu") if masked else None
    with torch.set_grad_enabled(grad):
        out, expected = ours(x, mask), monai(x, mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    if grad:
        grads = gradients(ours, [out])
        for name, theirs in gradients(monai, [expected]).items():
            torch.testing.assert_close(grads[name], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_v2", [False, True])
def test_swinunetr_is_monais(use_v2):
    """Size 64 has windows both padded and shifted, and a stage of a single window."""
    pytest.importorskip("einops", reason="MONAI's forward pass needs einops, ours does not")
    torch.manual_seed(0)
    monai = MonaiSwinUNETR(in_channels=1, out_channels=2, feature_size=12, use_v2=use_v2)
    state = {k: v for k, v in monai.state_dict().items() if not k.startswith("out.")}
    ours = build_backbone("swinunetr", feature_size=12, use_v2=use_v2)
    ours.load_state_dict(state, strict=True)
    x = torch.rand(2, 1, 64, 64, 64)
    with torch.no_grad():
        maps = ours.encode(x)
        for a, b in zip(maps, monai.swinViT(x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        torch.testing.assert_close(monai.out(ours.decode(x, maps)), monai(x), rtol=0, atol=1e-4)


def test_inference_mode_leaves_training_alone():
    """The window mask is cached: one made in inference mode must serve training too."""
    backbone = small("swinunetr", decoder=False)
    x = torch.rand(1, 1, 64, 96, 32)  # a size of its own, so that the mask is made here
    with torch.inference_mode():
        expected = backbone.encode(x)
    maps = backbone.encode(x)
    gradients(backbone, maps)
    torch.testing.assert_close(maps[-1], expected[-1].clone(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", SMALL)
def test_traces_into_one_graph(case):
    """torch.compile meets nothing that breaks the graph (dynamic sizes trace for minutes)."""
    backbone = small(case, decoder=False)
    x = image(backbone)
    compiled = torch.compile(backbone.encode, backend="eager", fullgraph=True, dynamic=False)
    for a, b in zip(compiled(x), backbone.encode(x), strict=True):
        torch.testing.assert_close(a, b)


def test_resunet_starts_with_he_weights_and_all_branches_in_use():
    backbone = small("resunet")
    block = backbone.encoder["stages"][1]["blocks"][0]
    assert block.conv2.norm.weight.eq(1).all() and block.conv1.norm.weight.eq(1).all()
    assert not block.conv1.conv.bias.any()
    fan_in = block.conv2.conv.weight[0].numel()
    assert abs(block.conv2.conv.weight.std() * (fan_in / 2) ** 0.5 - 1) < 0.05


@needs_shared
def test_resunet_has_nnunets_names_and_shapes():
    manifest = json.loads((SHARED / "manifests" / "resencl_canonical_out2.json").read_text())
    with torch.device("meta"):
        backbone = build_backbone("resunet")
    ours = {name: list(tensor.shape) for name, tensor in backbone.state_dict().items()}
    assert ours == {k: v for k, v in manifest.items() if not k.startswith("decoder.seg_layers.")}


@needs_shared
def test_resunet_agrees_with_published_network():
    formula = load_formula()
    reference = np.load(SHARED / "references" / "openmind_resencl.npz")
    backbone = formula.fill(build_backbone("resunet"))
    x = formula.volume()
    with torch.no_grad():
        maps = backbone.encode(x)
        decoded = backbone.decode(x, maps)[..., ::8, ::8, ::8]
    assert_agrees(maps[-1], reference["bottleneck"])
    # The file holds the decoder's features only after the published output layer.
    weight = formula.weight("decoder.seg_layers.4.weight", (2, 32, 1, 1, 1))
    bias = formula.weight("decoder.seg_layers.4.bias", (2,))
    logits = conv3d(decoded, *(torch.from_numpy(a).float() for a in (weight, bias)))
    assert_agrees(logits, reference["logits"])


@needs_shared
@pytest.mark.parametrize("use_v2", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_swinunetr_agrees_with_published_network(use_v2, grad):
    formula = load_formula()
    name = "monai_swinunetr_v2" if use_v2 else "monai_swinunetr"
    reference = np.load(SHARED / "references" / f"{name}.npz")
    backbone = formula.fill(build_backbone("swinunetr", use_v2=use_v2))
    x = formula.volume()
    with torch.set_grad_enabled(grad):  # the attention differs
        maps = backbone.encode(x)
    with torch.no_grad():
        assert_agrees(maps[-1], reference["encoder"])
        assert_agrees(backbone.encoder10(maps[-1]), reference["bottleneck"])
        assert_agrees(backbone.decode(x, maps)[..., ::8, ::8, ::8], reference["decoder"])
