"""Files laid out as the published ones are recognised, and compute what the networks computed."""

import functools
import importlib.util
import json

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from monai.networks import nets
from torch.overrides import TorchFunctionMode

from models.backbones import build_backbone
from tests.places import SHARED
from utils.tensor_files import WeightsError
from utils.weights import load_backbone

pytestmark = pytest.mark.skipif(
    not (SHARED / "references").exists(), reason="no reference outputs in ../shared/references"
)
V2, DS, LARGE = {"use_v2": True}, {"variant": "ds"}, {"use_v2": True, "feature_size": 96}
# name of the references: backbone, options, output layer of the published network
OUTPUTS = {
    "suprem_swinunetr": ("swinunetr", {}, None),
    "suprem_unet": ("unet", {}, None),
    "suprem_segresnet": ("segresnet", {}, "conv_final.2.conv"),
    "voco_swinunetr_v2": ("swinunetr", V2, "out.conv.conv"),
    "openmind_resencl": ("resunet", {}, "decoder.seg_layers.4"),
    "ctfm_segresnetds": ("segresnet", DS, "up_layers.3.head"),
}
# manifest: top-level container, backbone, options, tensors of encoder and decoder that are loaded,
# names of the file that are not used (the output layers and heads), origin
LAYOUTS = {
    "suprem_swinunetr": ("net", "swinunetr", {}, 126, 31, 13, "SuPreM Swin UNETR"),
    "suprem_unet": ("net", "unet", {}, 56, 48, 13, "SuPreM or CLIP-Driven"),
    "suprem_segresnet": ("net", "segresnet", {}, 58, 23, 2, "SuPreM SegResNet"),
    "clip_driven_universal_swinunetr": ("net", "swinunetr", {}, 126, 31, 13, "CLIP-Driven"),
    "clip_driven_universal_unet": ("net", "unet", {}, 56, 48, 13, "CLIP-Driven"),
    "monai_model_swinvit": ("state_dict", "swinunetr", {}, 126, 0, 8, "model_swinvit.pt"),
    "monai_ssl_pretrained_weights_50000": (
        *("model", "swinunetr", {}, 126, 31, 5, "ssl_pretrained_weights.pth"),
    ),
    "btcv_swin_unetr_base_5000ep_f48": ("state_dict", "swinunetr", {}, 126, 31, 2, "NVIDIA BTCV"),
    "repro_nv_swin_unetr_sslhead": ("state_dict", "swinunetr", {}, 126, 0, 16, "SSLHead"),
    "voco_ssl_head_B": (None, "swinunetr", V2, 134, 11, 0, "VoCo SSL head"),
    "voco_omni_B": ("state_dict", "swinunetr", V2, 134, 31, 2, "VoComni"),
    "models_genesis_unet_620": ("state_dict", "unet", {}, 56, 48, 2, "Models Genesis"),
    "fuse_oai_dino_unet3d_lightning": ("state_dict", "unet", {}, 56, 0, 56, "Lightning"),
    "openmind_resencl_mae_full": ("network_weights", "resunet", {}, 224, 30, 10, "OpenMind"),
    "openmind_resencl_encoder_only": ("network_weights", "resunet", {}, 224, 0, 0, "OpenMind"),
    "resencl_canonical_out2": ("network_weights", "resunet", {}, 224, 30, 10, "OpenMind"),
    "ctfm_segresencoder": (None, "segresnet", DS, 161, 0, 0, "CT-FM encoder"),
    "ctfm_segresnetds_ds1_out2": (None, "segresnet", DS, 161, 52, 2, "CT-FM SegResNetDS"),
    "ctfm_segresnetds_ds4_out2": (None, "segresnet", DS, 161, 52, 8, "CT-FM SegResNetDS"),
}


class NotInitialized(TorchFunctionMode):
    """Networks are built with whatever is in memory, which takes no time."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def build(name, decoder=True, **options):
    with NotInitialized():
        return build_backbone(name, decoder=decoder, **options).eval()


@pytest.fixture(scope="module")
def formula():
    spec = importlib.util.spec_from_file_location("formula", SHARED / "references" / "formula.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.weight = functools.lru_cache(maxsize=1000)(module.weight)  # many names, one tensor
    return module


@pytest.fixture
def published(formula, tmp_path):
    """A function: name of the references -> a file in the published layout."""

    def make(name):
        formula.weight.cache_clear()
        weight, formula.weight = (
            formula.weight,
            lambda key, shape, salt=1: weight(key, tuple(shape), salt),
        )
        content = formula.published_checkpoint(name)
        formula.weight = weight
        path, tensors = tmp_path / f"{name}.weights", {}
        state = next((x for x in content.values() if isinstance(x, dict)), content)
        for key, tensor in state.items():  # aliases share their storage, as when they were saved
            single = tensor.float() if tensor.is_floating_point() else tensor
            state[key] = tensors.setdefault((tensor.data_ptr(), tensor.shape), single)
        if name.startswith("ctfm"):
            safetensors.torch.save_file(state, path)
        else:
            torch.save(content, path)
        return path

    yield make
    for path in tmp_path.glob("*.weights"):  # hundreds of megabytes
        path.unlink()


def assert_agrees(ours, reference):
    """Agreement to 1e-4 of the reference's standard deviation."""
    error = np.abs(ours.detach().numpy() - reference).max() / reference.std()
    assert error < 1e-4, error


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_published_file_computes_what_the_published_network_did(name, formula, published):
    reference = np.load(SHARED / "references" / f"{name}.npz")
    kind, options, output_layer = OUTPUTS[name]
    backbone = build(kind, **options)
    report = load_backbone(backbone, published(name))
    assert report.left_random == [] and report.adapted == []
    assert len(report.warnings) == name.startswith("voco")  # its layout, but a torch of today
    # float32 alone differs by 2e-4 in this one, between processors with and without AVX-512
    dtype = torch.float64 if kind == "resunet" else torch.float32
    backbone, x = backbone.to(dtype), formula.volume().to(dtype)
    with torch.inference_mode():
        maps = backbone.encode(x)
        decoded = backbone.decode(x, maps)[..., ::8, ::8, ::8]
        assert_agrees(maps[-1], reference["encoder" if kind == "swinunetr" else "bottleneck"])
        if kind == "swinunetr":
            assert_agrees(backbone.encoder10(maps[-1]), reference["bottleneck"])
        if "decoder" in reference:
            assert_agrees(decoded, reference["decoder"])
        if "logits" in reference:
            shape = (reference["logits"].shape[1], decoded.shape[1], 1, 1, 1)
            weight = torch.as_tensor(formula.weight(f"{output_layer}.weight", shape)).float()
            bias = torch.as_tensor(formula.weight(f"{output_layer}.bias", shape[:1])).float()
            found = F.conv3d(decoded, weight.to(dtype), bias.to(dtype))
            assert_agrees(found, reference["logits"])


@pytest.mark.parametrize("use_v2", [False, True])
def test_a_file_of_monai_today_computes_what_monai_does(use_v2, formula, tmp_path):
    """A state_dict alone, written by the torch installed: the order of today's MONAI."""
    with NotInitialized():
        monai = nets.SwinUNETR(1, 2, feature_size=48, use_v2=use_v2)
    path = tmp_path / "monai.pt"
    torch.save(formula.fill(monai).state_dict(), path)
    backbone = build("swinunetr", use_v2=use_v2)
    report = load_backbone(backbone, path)
    path.unlink()
    reference = np.load(SHARED / "references" / f"monai_swinunetr{'_v2' if use_v2 else ''}.npz")
    x = formula.volume()
    with torch.set_grad_enabled(not use_v2):  # attention takes another way with gradients
        maps = backbone.encode(x)
    with torch.no_grad():
        decoded = backbone.decode(x, maps)[..., ::8, ::8, ::8]
        assert_agrees(maps[-1], reference["encoder"])
        assert_agrees(backbone.encoder10(maps[-1]), reference["bottleneck"])
        assert_agrees(decoded, reference["decoder"])
        assert_agrees(monai.out(decoded), reference["logits"])
    assert report.merge_order == "monai1.5" and "ASSUMED" in report.warnings[0]


# ---- every manifest
def file_of(name, container, path):
    """A small file with the names and shapes of a manifest; every tensor is one repeated number."""
    shapes = json.loads((SHARED / "manifests" / f"{name}.json").read_text())
    aliases = json.loads((SHARED / "manifests" / "openmind_resencl_aliases.json").read_text())
    state = {}
    for i, (key, shape) in enumerate(shapes.items()):
        if key in aliases and aliases[key] in state:
            state[key] = state[aliases[key]]
            continue
        whole = key.endswith(("relative_position_index", "num_batches_tracked"))
        number = torch.tensor(i, dtype=torch.int64 if whole else torch.float32)
        state[key] = number.expand([2] if shape is None else shape)  # not in the manifest
    torch.save(state if container is None else {container: state, "epoch": 1}, path)
    return state


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_published_layout_is_recognised(name, tmp_path):
    container, kind, options, encoder, decoder, not_used, origin = LAYOUTS[name]
    state = file_of(name, container, tmp_path / "weights.pt")
    backbone = build(kind, **options)
    report = load_backbone(backbone, tmp_path / "weights.pt")
    assert (report.encoder[0], report.decoder[0]) == (encoder, decoder)
    assert report.encoder[0] == report.encoder[1]
    assert len(report.ignored) == not_used
    assert encoder + decoder + not_used + len(report.duplicates) == len(state)
    assert origin in report.origin
    assert report.merge_order == ("published" if kind == "swinunetr" else None)
    assert not any(x.startswith(("swinViT.", "encoder.", "down_")) for x in report.left_random)
    if "lightning" in name:
        assert report.container == "state_dict.teacher_backbone"
    values = {float(x.flatten()[0]) for x in state.values()}  # of the file, not of the memory
    loaded = [x for n, x in backbone.state_dict().items() if n not in report.left_random]
    assert all(float(x.flatten()[0]) in values for x in loaded if x.is_floating_point())


@pytest.mark.parametrize("name", ["voco_ssl_head_L", "voco_omni_L"])
def test_large_files_name_their_size(name, tmp_path):
    """290 M parameters: only the encoder is built here."""
    file_of(name, LAYOUTS[name[:-1] + "B"][0], tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match="swinunetr.feature_size=96 swinunetr.use_v2=true"):
        load_backbone(build("swinunetr", decoder=False, **V2), tmp_path / "weights.pt")
    if name == "voco_ssl_head_L":
        report = load_backbone(build("swinunetr", False, **LARGE), tmp_path / "weights.pt")
        assert report.encoder == (134, 134) and len(report.ignored) == 11


@pytest.mark.parametrize("kind", ["resunet", "unet"])
def test_nnunets_plain_network_is_refused_with_the_reason(kind, tmp_path):
    file_of("vocomni_nnunet_plainconv", "network_weights", tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match="none: this is nnU-Net's PlainConvUNet"):
        load_backbone(build(kind), tmp_path / "weights.pt")


def test_every_manifest_is_tested():
    others = {"voco_ssl_head_L", "voco_omni_L", "vocomni_nnunet_plainconv"}
    others |= {"openmind_resencl_aliases"}
    assert {x.stem for x in (SHARED / "manifests").glob("*.json")} == LAYOUTS.keys() | others
