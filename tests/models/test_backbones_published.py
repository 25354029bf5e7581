"""The backbones agree with the published networks, in names, shapes and numbers; against stored
outputs: tests/utils/weights."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from monai.networks import nets
from monai.networks.nets.swin_unetr import PatchMerging, WindowAttention, compute_mask
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models.backbones import build_backbone
from models.swinunetr import FusedWindowAttention
from tests.models.test_backbones import gradients
from tests.places import SHARED

needs_shared = pytest.mark.skipif(
    not (SHARED / "references").exists(), reason="no reference outputs in ../shared/references"
)
# manifest: the file's prefix, after it what begins the names of other parts, backbone, options
MANIFESTS = {
    "suprem_unet": ("module.backbone.", (), "unet", {}),
    "models_genesis_unet_620": ("module.", ("out_tr.",), "unet", {}),
    "suprem_segresnet": ("module.", ("conv_final.2.",), "segresnet", {}),
    "ctfm_segresnetds_ds1_out2": ("", ("up_layers.3.head.",), "segresnet", {"variant": "ds"}),
    "suprem_swinunetr": ("module.backbone.", ("out.",), "swinunetr", {}),
    "voco_omni_B": ("", ("out.",), "swinunetr", {"use_v2": True}),
    "resencl_canonical_out2": ("", ("decoder.seg_layers.",), "resunet", {}),
}


def shapes(backbone):
    return {name: list(tensor.shape) for name, tensor in backbone.state_dict().items()}


@needs_shared
@pytest.mark.parametrize("name", MANIFESTS)
def test_names_and_shapes_are_those_of_the_files(name):
    manifest = json.loads((SHARED / "manifests" / f"{name}.json").read_text())
    prefix, others, kind, options = MANIFESTS[name]
    with torch.device("cpu" if kind == "swinunetr" else "meta"):  # MONAI's cannot be built on meta
        ours = shapes(build_backbone(kind, **options))
    theirs = {k.removeprefix(prefix): v for k, v in manifest.items() if k.startswith(prefix)}
    assert ours == {k: v for k, v in theirs.items() if not k.startswith(others)}


# ---- resunet
def test_resunet_has_nnunets_names():
    """ResEnc-L in short: what differs between stages is their number of blocks."""
    with torch.device("meta"):
        ours = shapes(build_backbone("resunet"))
    assert len(ours) == 254
    assert ours["encoder.stem.convs.0.conv.weight"] == [32, 1, 3, 3, 3]
    assert ours["encoder.stages.5.blocks.5.conv2.norm.weight"] == [320]
    assert ours["encoder.stages.4.blocks.0.skip.1.conv.weight"] == [320, 256, 1, 1, 1]
    assert ours["decoder.transpconvs.0.weight"] == [320, 320, 2, 2, 2]
    assert ours["decoder.stages.4.convs.0.conv.weight"] == [32, 64, 3, 3, 3]


# ---- unet
def plain_unet(state, x):
    """The U-Net of Models Genesis, written down from its figure: encoder maps and decoder maps."""

    def convs(name, x):
        for i in range(2):
            part = f"{name}.ops.{i}"
            x = F.conv3d(x, state[f"{part}.conv1.weight"], state[f"{part}.conv1.bias"], padding=1)
            mean = x.mean(dim=(0, 2, 3, 4), keepdim=True)
            var = x.var(dim=(0, 2, 3, 4), keepdim=True, unbiased=False)
            weight, bias = (
                state[f"{part}.bn1.{p}"].view(1, -1, 1, 1, 1) for p in ("weight", "bias")
            )
            x = ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)
        return x

    def up(name, x, skip):
        weight, bias = (state[f"{name}.up_conv.{p}"] for p in ("weight", "bias"))
        return convs(name, torch.cat([F.conv_transpose3d(x, weight, bias, stride=2), skip], dim=1))

    e64 = convs("down_tr64", x)
    e128 = convs("down_tr128", F.max_pool3d(e64, 2))
    e256 = convs("down_tr256", F.max_pool3d(e128, 2))
    e512 = convs("down_tr512", F.max_pool3d(e256, 2))
    d256 = up("up_tr256", e512, e256)
    d128 = up("up_tr128", d256, e128)
    return [e64, e128, e256, e512], [up("up_tr64", d128, e64), d128, d256]


def test_unet_is_models_genesis():
    torch.manual_seed(0)
    unet = build_backbone("unet", feature_size=8)
    for name, p in unet.named_parameters():
        if ".bn1." in name:
            nn.init.normal_(p, mean=1.0, std=0.3)
    x = torch.rand(2, 1, 16, 24, 16)
    maps = unet.encode(x)
    expected_maps, expected_decoded = plain_unet(unet.state_dict(), x)
    for a, b in zip(maps, expected_maps, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    for a, b in zip(unet.decode_all(x, maps), expected_decoded, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_unet_has_models_genesis_names():
    with torch.device("meta"):
        ours = shapes(build_backbone("unet"))
    widths = {"down_tr64": (1, 32, 64), "down_tr128": (64, 64, 128), "down_tr256": (128, 128, 256)}
    widths |= {"down_tr512": (256, 256, 512), "up_tr256": (768, 256, 256)}
    widths |= {"up_tr128": (384, 128, 128), "up_tr64": (192, 64, 64)}
    expected = {}
    for stage, (before, middle, after) in widths.items():
        for i, (a, b) in enumerate(((before, middle), (middle, after))):
            part = f"{stage}.ops.{i}"
            expected |= {f"{part}.conv1.weight": [b, a, 3, 3, 3], f"{part}.conv1.bias": [b]}
            norm = ("weight", "bias", "running_mean", "running_var")
            expected |= {f"{part}.bn1.{name}": [b] for name in norm}
            expected[f"{part}.bn1.num_batches_tracked"] = []
    for stage, n in (("up_tr256", 512), ("up_tr128", 256), ("up_tr64", 128)):
        expected |= {f"{stage}.up_conv.weight": [n, n, 2, 2, 2], f"{stage}.up_conv.bias": [n]}
    assert len(ours) == 104
    assert ours == expected


def test_unet_evaluates_as_it_trains_by_the_batch_at_hand():
    torch.manual_seed(0)
    unet = build_backbone("unet", feature_size=4, decoder=False)
    before = copy.deepcopy(unet.state_dict())
    one, other = torch.rand(2, 1, 1, 16, 16, 16).unbind()
    training = unet.encode(one)[-1]
    unet.eval()
    torch.testing.assert_close(unet.encode(one)[-1], training, rtol=0, atol=0)
    beside = unet.encode(torch.cat([one, other * 3]))[-1][:1]
    assert not torch.allclose(beside, training, atol=1e-3)
    assert all(torch.equal(before[name], t) for name, t in unet.state_dict().items())


# ---- segresnet
@pytest.mark.parametrize("blocks", [(1, 2, 2, 4), (2, 1)])
def test_segresnet_is_monais(blocks):
    torch.manual_seed(0)
    sizes = {"blocks_down": blocks, "blocks_up": (1,) * (len(blocks) - 1)}
    monai = nets.SegResNet(init_filters=8, out_channels=3, **sizes)
    state = {k: v for k, v in monai.state_dict().items() if not k.startswith("conv_final.2.")}
    ours = build_backbone("segresnet", feature_size=8, blocks=blocks)
    ours.load_state_dict(state, strict=True)
    x = torch.rand(2, 1, 16, 24, 16)
    with torch.no_grad():
        maps = ours.encode(x)
        torch.testing.assert_close(maps[-1], monai.encode(x)[0])
        torch.testing.assert_close(monai.conv_final[2](ours.decode(x, maps)), monai(x))


def test_segresnet_ds_is_monais():
    torch.manual_seed(0)
    monai = nets.SegResNetDS(init_filters=8, out_channels=3, blocks_down=(1, 2, 1), dsdepth=2)
    for norm in monai.modules():
        if isinstance(norm, nn.BatchNorm3d):
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    state = {k: v for k, v in monai.state_dict().items() if ".head." not in k}
    ours = build_backbone("segresnet", variant="ds", feature_size=8, blocks=(1, 2, 1))
    ours.load_state_dict(state, strict=True)
    x = torch.rand(2, 1, 16, 24, 16)
    heads = [stage["head"] for stage in monai.up_layers][::-1]
    with torch.no_grad():
        for training in (False, True):
            ours.train(training), monai.train(training)
            decoded = ours.decode_all(x, ours.encode(x))
            logits = [head(map_) for head, map_ in zip(heads, decoded, strict=True)]
            expected = monai(x) if training else [monai(x)]  # deep supervision
            for a, b in zip(logits, expected, strict=False):
                torch.testing.assert_close(a, b)
    for (name, a), b in zip(monai.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("options, count, widest", [({}, 81, 128), ({"variant": "ds"}, 213, 512)])
def test_segresnet_has_the_published_sizes(options, count, widest):
    with torch.device("meta"):
        ours = shapes(build_backbone("segresnet", **options))
        encoder = shapes(build_backbone("segresnet", decoder=False, **options))
    assert len(ours) == count
    assert max(shape[0] for shape in encoder.values() if shape) == widest
    assert ours.items() > encoder.items()


# ---- swinunetr
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


class MergingUntil14(PatchMerging):
    """Patch merging of MONAI 0.9 to 1.4: the 6th of 8 neighbours is the 3rd, the 7th the 4th."""

    def forward(self, x):
        even, odd = slice(0, None, 2), slice(1, None, 2)
        parts = [x[:, even, even, even], x[:, odd, even, even], x[:, even, odd, even]]
        parts += [x[:, even, even, odd], x[:, odd, even, odd], x[:, even, odd, even]]
        parts += [x[:, even, even, odd], x[:, odd, odd, odd]]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


@pytest.mark.parametrize("use_v2, order", [(False, "monai1.5"), (True, "published")])
def test_swinunetr_is_monais(use_v2, order):
    """Size 64 has windows both padded and shifted, and a stage of a single window."""
    pytest.importorskip("einops", reason="MONAI's forward pass needs einops, ours does not")
    torch.manual_seed(0)
    merging = "merging" if order == "monai1.5" else MergingUntil14
    options = {"feature_size": 12, "use_v2": use_v2}
    monai = nets.SwinUNETR(in_channels=1, out_channels=2, downsample=merging, **options)
    state = {k: v for k, v in monai.state_dict().items() if not k.startswith("out.")}
    ours = build_backbone("swinunetr", **options)
    ours.load_state_dict(state, strict=True)
    ours.merge_order = order
    x = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        maps = ours.encode(x)
        for a, b in zip(maps, monai.swinViT(x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        torch.testing.assert_close(monai.out(ours.decode(x, maps)), monai(x), rtol=0, atol=1e-4)


def swin_encoder(seed=0):
    torch.manual_seed(seed)
    return build_backbone("swinunetr", decoder=False, feature_size=12)


def deepest(backbone):
    with torch.no_grad():
        return backbone.encode(torch.linspace(0, 1, 32**3).view(1, 1, 32, 32, 32).sin())[-1]


def test_merge_order_changes_the_output_and_no_name():
    backbone = swin_encoder()
    names, before = set(backbone.state_dict()), deepest(backbone)
    backbone.merge_order = "published"
    assert set(backbone.state_dict()) - names == {"merge_order"}
    assert not torch.allclose(deepest(backbone), before, atol=0.1)
    with pytest.raises(ValueError, match="monai0.9.*monai1.5 or published"):
        backbone.merge_order = "monai0.9"


def test_merge_order_follows_the_weights(tmp_path):
    old, new = swin_encoder(), swin_encoder(1)
    old.merge_order = "published"
    assert copy.deepcopy(old).merge_order == "published"
    torch.save(nn.ModuleDict({"backbone": old}).state_dict(), tmp_path / "old.pt")
    saved = torch.load(tmp_path / "old.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    nn.ModuleDict({"backbone": new}).load_state_dict(saved, strict=True)
    assert new.merge_order == "published"
    assert torch.equal(deepest(new), deepest(old))
    assert "backbone.merge_order" in saved  # loading takes it from a copy
    new.load_state_dict(swin_encoder(2).state_dict(), strict=True)
    assert new.merge_order == "monai1.5"
    with pytest.raises(RuntimeError, match="merge_order: unknown order"):
        new.load_state_dict({**old.state_dict(), "merge_order": torch.zeros(8, 3)})


def test_ddp_keeps_the_merge_order():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        backbone = swin_encoder()
        backbone.merge_order = "published"
        wrapped = DistributedDataParallel(backbone)
        assert "module.merge_order" in wrapped.state_dict()
        other = DistributedDataParallel(swin_encoder(1))
        other.load_state_dict(wrapped.state_dict())
        assert other.module.merge_order == "published"
    finally:
        dist.destroy_process_group()
