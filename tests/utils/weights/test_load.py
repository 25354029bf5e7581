"""Loading backbones from files of every layout, made small here; what does not fit is refused."""

import copy
import json
import zipfile
from functools import partial

import pytest
import torch

from models.backbones import build_backbone, facts_of
from tests.places import ROOT
from utils.config.command_line import parse_command_line
from utils.config.dino import DinoConfig, impossible_dino
from utils.tensor_files import WeightsError
from utils.weights import LoadReport, compare_input, load_backbone

CONFIG = ROOT / "dino_config.yaml"
SMALL = {
    "resunet": {"features": (4, 8, 12), "blocks": (1, 2, 2)},
    "swinunetr": {"feature_size": 12},
    "swinunetr v2": {"feature_size": 12, "use_v2": True},
    "unet": {"feature_size": 4},
    "segresnet": {"feature_size": 8, "blocks": (1, 2, 1)},
    "segresnet ds": {"variant": "ds", "feature_size": 8, "blocks": (1, 2, 1)},
}
SWIN = ("swinunetr", "swinunetr v2")
IMPOSSIBLE = partial(impossible_dino, facts_of=facts_of)


def small(case, seed=0, **options):
    torch.manual_seed(seed)
    return build_backbone(case.split()[0], **(SMALL[case] | options))


def weights(case, **options):
    """A state to load: not that of small(case)."""
    state = small(case, seed=1, **options).state_dict()
    for i, (name, x) in enumerate(state.items()):
        if "running" in name or name.endswith("num_batches_tracked"):
            x.fill_(i + 1)
        elif x.is_floating_point() and x.ndim == 1:
            x.add_(torch.rand(x.shape))
    return state


@pytest.fixture(scope="module")
def states():
    return {case: weights(case) for case in SMALL}


@pytest.fixture
def load(tmp_path):
    """A function: (backbone, content) -> the report of loading a file of that content."""

    def save_and_load(backbone, content):
        torch.save(content, tmp_path / "weights.pt")
        return load_backbone(backbone, tmp_path / "weights.pt")

    return save_and_load


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0, msg=name)


def assert_refused(load, backbone, content, message):
    """Loading raises an error with this message and leaves the backbone as it was."""
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(WeightsError, match=message):
        load(backbone, content)
    assert_equal(backbone.state_dict(), before)


def renamed(state, change):
    return {change(name): tensor for name, tensor in state.items()}


def inserted(part):
    """A wrapper of inner modules: encoder.stages.0 -> encoder.part.stages.0"""
    return lambda state: renamed(state, lambda name: f".{part}.".join(name.split(".", 1)))


def prefixed(prefix):
    return lambda state: renamed(state, lambda name: prefix + name)


def nested(state):
    """A dict per module: {"encoder": {"stem": {...}}}"""
    tree = {}
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = tensor
    return tree


def optimizer(state):
    moments = {i: {"exp_avg": x, "step": 3} for i, x in enumerate(state.values())}
    return {"state": moments, "param_groups": [{"lr": 0.1, "params": list(moments)}]}


LAYOUTS = {
    "flat": dict,
    "net": lambda state: {"net": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "best": 0.5},
    "network_weights": lambda state: {"network_weights": state, "trainer_name": "x"},
    "with an optimizer": lambda state: {"model": state, "optimizer": optimizer(state)},
    "model.state_dict": lambda state: {"model": {"state_dict": state, "name": "x"}},
    "in a list": lambda state: [{"epoch": 1}, {"weights": state}],
    "nested": nested,
    "DDP": prefixed("module."),
    "DDP and compile": prefixed("module._orig_mod."),
    "compile and DDP": lambda state: {"state_dict": prefixed("_orig_mod.module.")(state)},
    "FSDP within": inserted("_fsdp_wrapped_module"),
    "recomputation within": inserted("_checkpoint_wrapped_module"),
    "module within": inserted("module"),
    "backbone": lambda state: {"net": prefixed("module.backbone.")(state)},
    "deep": lambda state: {"state_dict": prefixed("trainer.model.module.net.")(state)},
    "and heads": lambda state: {"state_dict": state | {"head.weight": torch.ones(3)}},
    "teacher": lambda state: {"student": noise(state), "teacher": state},
    "DINO": lambda state: {
        "student": prefixed("module.backbone.")(noise(state)),
        "teacher": prefixed("module.backbone.")(state) | {"module.head.mlp.weight": torch.ones(3)},
        "dino_loss": {"center": torch.zeros(4)},
    },
    "3DINO": lambda state: {"teacher": prefixed("backbone.")(state)},
    "Lightning": lambda state: {
        "state_dict": prefixed("student_backbone.")(noise(state))
        | prefixed("teacher_backbone.")(state),
        "pytorch-lightning_version": "2.0",
    },
    "ours, last.pt": lambda state: {
        "format": 1,
        "modules": {
            "student": prefixed("backbone.")(noise(state)),
            "teacher": prefixed("backbone.")(state),
        },
    },
    "the same twice": lambda state: {"model": state, "model_ema": state},
    "parameters": lambda state: {
        name: torch.nn.Parameter(x) if x.is_floating_point() else x for name, x in state.items()
    },
}


def noise(state):
    """Other weights of the same shapes, that must not be taken."""
    return {name: x + 1 if x.is_floating_point() else x for name, x in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["resunet", "unet", "swinunetr", "segresnet ds"])
def test_every_layout_loads_everything(case, layout, states, load):
    backbone, state = small(case), states[case]
    report = load(backbone, LAYOUTS[layout](state))
    order = report.merge_order
    assert_equal({k: v for k, v in backbone.state_dict().items() if k != "merge_order"}, state)
    assert order in (("published", "monai1.5") if case in SWIN else (None,))
    assert report.left_random == [] and report.adapted == []
    assert report.encoder[0] == report.encoder[1] and report.decoder[0] == report.decoder[1]
    assert sum(report.encoder) + sum(report.decoder) == 2 * len(state)


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(case, dtype, states, load):
    """Cast with everything that is not a weight; half precision cannot hold index buffers."""
    backbone, state = small(case), states[case]
    own = copy.deepcopy(backbone.state_dict())
    load(backbone, {name: x.to(dtype) for name, x in state.items() if x.ndim})
    for name, x in backbone.state_dict().items():
        if "relative_position_index" in name:
            assert torch.equal(x, own[name])
        elif x.ndim and name != "merge_order":
            assert x.dtype == own[name].dtype and torch.equal(x, state[name].to(dtype).to(x.dtype))


def test_tensors_that_share_or_repeat_a_storage(states, load):
    state, parts, start = states["unet"], {}, 0
    whole = torch.cat([x.flatten().float() for x in state.values()])
    for name, x in state.items():
        parts[name] = whole[start : start + x.numel()].view(x.shape).to(x.dtype)
        start += x.numel()
    backbone = small("unet")
    load(backbone, parts)
    assert_equal(backbone.state_dict(), state)
    ones = {name: torch.ones((), dtype=x.dtype).expand(x.shape) for name, x in state.items()}
    load(backbone, ones)
    assert all(x.eq(1).all() for x in backbone.state_dict().values())


@pytest.mark.parametrize("case", SMALL)
def test_an_encoder_takes_its_part_of_a_whole_file(case, states, load):
    encoder = small(case, decoder=False)
    report = load(encoder, {"net": states[case]})
    loaded = {k: v for k, v in encoder.state_dict().items() if k != "merge_order"}
    assert_equal(loaded, {name: states[case][name] for name in loaded})
    assert report.decoder == (0, 0) and report.left_random == []
    assert len(report.ignored) == len(states[case]) - len(loaded)


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("rooted", [True, False])
def test_a_file_of_the_encoder_alone(case, rooted, states, load):
    """The decoder stays random, and the report says so."""
    encoder = small(case, decoder=False).state_dict()
    state = {name: states[case][name] for name in encoder}
    root = {"resunet": "encoder.", "swinunetr": "swinViT."}.get(case.split()[0], "")
    root = "encoder." if case == "segresnet ds" else root
    backbone = small(case)
    before = copy.deepcopy(backbone.state_dict())
    report = load(backbone, state if rooted else renamed(state, lambda n: n.removeprefix(root)))
    after = {k: v for k, v in backbone.state_dict().items() if k != "merge_order"}
    assert_equal(after, before | state)
    decoder = [name for name in before if name not in encoder]
    assert report.decoder == (0, len(decoder))
    assert report.left_random == [x for x in decoder if not x.endswith("num_batches_tracked")]


def test_a_student_without_teacher_is_taken_with_a_warning(states, load):
    backbone, state = small("unet"), states["unet"]
    report = load(backbone, {"student": state})
    assert_equal(backbone.state_dict(), state)
    assert any("student's weights" in x for x in report.warnings)


# ---- names
def test_duplicates_are_told_from_heads(states, load):
    """OpenMind's files hold the encoder four times and an output layer."""
    state = states["resunet"]
    aliases = {}
    for name, x in state.items():
        for part, number in ((".conv.", 0), (".norm.", 1)):
            aliases[name.replace(part, f".all_modules.{number}.")] = x.clone()
    double = {f"decoder.{name}": x for name, x in state.items() if name.startswith("encoder.")}
    head = {"decoder.seg_layers.0.weight": torch.ones(1, 8, 1, 1, 1)}
    backbone = small("resunet")
    report = load(backbone, {"network_weights": state | aliases | double | head})
    assert_equal(backbone.state_dict(), state)
    assert report.ignored == ["network_weights.decoder.seg_layers.0.weight"]
    assert set(report.duplicates) == {
        f"network_weights.{name}" for name in (aliases | double).keys() - state.keys()
    }
    report = load(small("resunet"), {"network_weights": aliases})  # the second names alone
    assert report.left_random == []


def test_a_plain_name_is_preferred_to_an_alias(states, load):
    state = states["resunet"]
    wrong = {name.replace(".conv.", ".all_modules.0."): x + 1 for name, x in state.items()}
    backbone = small("resunet")
    load(backbone, wrong | state)
    assert_equal(backbone.state_dict(), state)


def test_old_names_of_swin(states, load):
    state = states["swinunetr"]

    def old(name):  # of model_swinvit.pt, with the second index of ssl_pretrained_weights.pth
        name = name.replace("mlp.linear", "mlp.fc").replace("swinViT.", "encoder.")
        for i in range(1, 5):
            name = name.replace(f"layers{i}.0.", f"layers{i}.0.0.")
        return name

    backbone = small("swinunetr")
    extra = {"encoder.norm.weight": torch.ones(96), "encoder.mask_token": torch.ones(1, 1, 96)}
    report = load(backbone, {"model": renamed(state, old) | extra})
    assert report.left_random == [] and report.encoder[0] == report.encoder[1]
    loaded = {k: v for k, v in backbone.state_dict().items() if k != "merge_order"}
    assert_equal(loaded, state)


# ---- input channels
@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("given, wanted", [(1, 2), (1, 3), (3, 1), (3, 2), (2, 3)])
def test_other_input_channels(case, given, wanted, load):
    """Every first convolution answers an image with equal channels as before."""
    source = small(case, seed=1, in_channels=given).state_dict()
    backbone = small(case, in_channels=wanted)
    report = load(backbone, source)
    assert report.left_random == []
    assert len(report.adapted) == (3 if case in SWIN else 1)
    for name in report.adapted:
        ours = backbone.state_dict()[name]
        assert ours.shape[1] == wanted
        torch.testing.assert_close(ours.sum(dim=1), source[name].sum(dim=1))
        assert given != 1 or torch.equal(ours[:, 0], ours[:, 1])


def test_other_input_channels_in_numbers(load):
    source, backbone = small("resunet", seed=1).eval(), small("resunet", in_channels=3).eval()
    report = load(backbone, source.state_dict())
    how = "1 in the file, 3 here: repeated, and divided by the number of repeats in 1: encoder.stem"
    assert f"other channels  {how}.convs.0.conv.weight" in str(report)
    x = torch.rand(1, 1, 8, 8, 8)
    with torch.no_grad():
        for a, b in zip(
            source.encode(x), backbone.encode(x.expand(-1, 3, -1, -1, -1)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- what does not fit
FITS = {
    "resunet": r"backbone=resunet resunet.features=\[4, 8, 12\] resunet.blocks=\[1, 2, 2\]",
    "swinunetr": "backbone=swinunetr swinunetr.feature_size=12 swinunetr.use_v2=false",
    "swinunetr v2": "backbone=swinunetr swinunetr.feature_size=12 swinunetr.use_v2=true",
    "unet": "backbone=unet unet.feature_size=4",
    "segresnet": "segresnet.variant=standard segresnet.feature_size=8 "
    r"segresnet.blocks=\[1, 2, 1\]",
    "segresnet ds": r"segresnet.variant=ds segresnet.feature_size=8 segresnet.blocks=\[1, 2, 1\]",
}


@pytest.mark.parametrize("case", SMALL)
def test_another_network_is_refused_and_named(case, states, load):
    for other in SMALL.keys() - {case}:
        message = f"weights.pt: does not fit(.|\n)*{FITS[case]}"
        assert_refused(load, small(other), {"net": prefixed("module.")(states[case])}, message)


@pytest.mark.parametrize(
    "case, options",
    [
        ("resunet", {"blocks": (1, 1, 2)}),  # all of its tensors are in the file
        ("resunet", {"features": (4, 8), "blocks": (1, 2)}),
        ("resunet", {"features": (4, 8, 12, 12), "blocks": (1, 2, 2, 1)}),
        ("resunet", {"features": (4, 8, 16)}),
        ("swinunetr", {"feature_size": 24}),
        ("unet", {"feature_size": 8}),
        ("segresnet", {"blocks": (1, 1, 1)}),
        ("segresnet", {"feature_size": 16}),
        ("segresnet ds", {"blocks": (1, 2)}),
    ],
)
def test_other_sizes_are_refused(case, options, states, load):
    assert_refused(load, small(case, **options), states[case], FITS[case])


def test_other_strides_are_refused(states, load):
    """Anisotropic nnU-Nets: their encoders have the same tensors."""
    state = dict(states["resunet"])
    name = "decoder.transpconvs.1.weight"
    state[name] = state[name][:, :, :1]
    assert_refused(load, small("resunet", decoder=False), state, name)


def transformer(block, *patch):
    """The names of a ViT: `block` numbers the third block, `patch` is the size of its patches."""
    block = f"blocks.{block}"
    state = {f"{block}.attn.qkv.weight": torch.ones(12, 4), f"{block}.mlp.fc1.bias": torch.ones(16)}
    return state | {"patch_embed.proj.weight": torch.ones(4, 1, *patch), "cls_token": torch.ones(4)}


@pytest.mark.parametrize(
    "content, network",
    [
        (
            {"network_weights": {"encoder.stages.0.0.convs.0.conv.weight": torch.ones(4, 4)}},
            "nnU-Net's PlainConvUNet; resunet is its residual encoder U-Net",
        ),
        (
            {"teacher": prefixed("backbone.")(transformer("0.2", 8, 8, 8))},
            "a vision transformer for volumes, such as 3DINO's",
        ),
        (
            {"student": prefixed("module.backbone.")(transformer("2", 8, 8))},
            "a vision transformer for 2D images, such as facebookresearch/dino's",
        ),
        (transformer("2", 8, 8), "a vision transformer for 2D images, such as"),
        ({"teacher": {"backbone.blocks.2.attn.qkv.weight": torch.ones(12, 4)}}, "a vision transf"),
    ],
)
@pytest.mark.parametrize("case", ["resunet", "swinunetr", "unet", "segresnet ds"])
def test_networks_that_no_backbone_is_are_named(case, content, network, load):
    """3DINO's published file (block_chunks 4) has its blocks numbered as here."""
    with pytest.raises(WeightsError) as e:
        load(small(case), content)
    fits = str(e.value).splitlines()[-1]
    assert fits.startswith(f"  fits      none: this is {network}")


@pytest.mark.parametrize("layout", ["3DINO", "DINO"])
def test_layouts_of_others_are_not_called_their_weights(layout, states, load):
    report = load(small("unet"), LAYOUTS[layout](states["unet"]))
    assert report.origin.startswith("DINO, laid out as by ")


def test_one_layer_of_another_shape_is_refused(states, load):
    state = dict(states["unet"])
    name = "down_tr256.ops.0.conv1.weight"
    state[name] = state[name][..., :1]
    message = f"differs +{name}: 8x8x3x3x1 in the file, 8x8x3x3x3"
    assert_refused(load, small("unet"), state, message)


def test_a_decoder_of_another_shape_stays_random_and_is_named(states, load):
    state = {
        n: x[:1] if n.startswith("up_tr64") and x.ndim else x for n, x in states["unet"].items()
    }
    backbone = small("unet")
    report = load(backbone, state)
    assert report.encoder == (56, 56) and report.decoder[0] < 48
    assert "another shape in the file" in report.warnings[0] and "up_tr64" in report.warnings[0]
    assert_equal(
        {n: x for n, x in backbone.state_dict().items() if not n.startswith("up_tr64")},
        {n: x for n, x in states["unet"].items() if not n.startswith("up_tr64")},
    )


def test_95_percent_of_the_encoder(states, load):
    state = states["swinunetr"]
    names = [n for n in state if n.startswith("swinViT.") and "index" not in n]  # 118
    dropped = [n for n in names if ".norm" in n]
    few = {n: x for n, x in state.items() if n not in dropped[:5]}
    backbone = small("swinunetr")
    before = copy.deepcopy(backbone.state_dict())
    report = load(backbone, few)
    assert report.left_random == dropped[:5]
    assert report.encoder == (121, 126)
    assert any("random in the encoder: 5:" in x for x in report.warnings)
    assert "121 of 126" in str(report) and "WARNING" in str(report)
    assert_equal(
        {n: backbone.state_dict()[n] for n in dropped[:5]}, {n: before[n] for n in dropped[:5]}
    )
    many = {n: x for n, x in state.items() if n not in dropped[:6]}
    assert_refused(load, small("swinunetr"), many, "112 of the 118 tensors.*95%")


def test_buffers_that_are_no_weights_may_be_missing(states, load):
    for case in ("swinunetr", "unet", "segresnet ds"):
        left_out = ("relative_position_index", "num_batches_tracked")
        state = {n: x for n, x in states[case].items() if not n.endswith(left_out)}
        report = load(small(case), state)
        assert report.left_random == []
        assert "more are buffers without weights" in str(report)


def test_weights_that_are_no_numbers_are_refused(states, load):
    state = dict(states["unet"])
    state["down_tr64.ops.0.conv1.bias"] = torch.tensor([float("nan"), 1.0])
    message = "NaN or infinite values in 1: down_tr64.ops.0.conv1.bias"
    assert_refused(load, small("unet"), state, message)
    quantized = {n: x.to(torch.int8) for n, x in states["unet"].items()}
    assert_refused(load, small("unet"), quantized, "does not fit")


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "holds no tensors"),
        ({"epoch": 3, "args": ["a", 1]}, "holds no tensors"),
        ([], "holds no tensors"),
        (torch.ones(3), "does not fit"),
        ({"weight": torch.ones(3)}, "fits +none that is known here"),
        ({"weight": torch.ones(3).to_sparse()}, "holds no tensors"),
        ({3: torch.ones(3)}, "does not fit"),
    ],
)
def test_odd_contents(content, message, load):
    assert_refused(load, small("unet"), content, message)


def test_an_optimizer_alone_is_refused(states, load):
    content = {"optimizer": optimizer(states["unet"])}
    assert_refused(load, small("unet"), content, "does not fit(.|\n)*optimizer.state.0.exp_avg")


def test_dicts_within_themselves(states, load):
    content = {"state_dict": states["unet"]}
    content["again"] = content
    content["list"] = [content, content]
    assert load(small("unet"), content).left_random == []


# ---- the order of patch merging
def order_of(load, content):
    backbone = small("swinunetr", decoder=False)
    report = load(backbone, content)
    assert backbone.merge_order == report.merge_order
    return report.merge_order, [x for x in report.warnings if "ASSUMED" in x]


def test_our_files_say_their_order(states, load):
    backbone = small("swinunetr", seed=1)
    for order in ("published", "monai1.5", "published"):
        backbone.merge_order = order
        ours = {"format": 1, "config": {"experiment": "x"}, "settings": {"stage": "dino"}}
        whole = {"modules": {"teacher": prefixed("backbone.")(backbone.state_dict())}}
        assert order_of(load, ours | {"backbone": backbone.state_dict()}) == (order, [])
        assert order_of(load, ours | whole) == (order, [])


def test_order_of_a_published_layout(states, load):
    state = states["swinunetr"] | {"out.conv.conv.weight": torch.ones(14, 12, 1, 1, 1)}
    order, assumed = order_of(load, {"state_dict": state})  # BTCV, but saved by a torch of today
    assert order == "published" and "NVIDIA BTCV" in assumed[0]
    suprem = prefixed("module.backbone.")(state) | {"module.organ_embedding": torch.ones(32, 512)}
    assert order_of(load, {"net": suprem}) == ("published", [])


def test_order_of_unknown_files_is_assumed_and_said(states, load, tmp_path):
    order, assumed = order_of(load, states["swinunetr"])
    assert order == "monai1.5" and "2.7 or later" in assumed[0]
    with (
        zipfile.ZipFile(tmp_path / "weights.pt") as new,
        zipfile.ZipFile(tmp_path / "old.pt", "w") as old,
    ):
        for name in new.namelist():
            if not name.endswith("/.format_version"):
                old.writestr(name, new.read(name))
    report = load_backbone(small("swinunetr"), tmp_path / "old.pt")
    assert report.merge_order == "published" and "before 2.7" in str(report)


@pytest.mark.parametrize("order", ["published", "monai1.5"])
def test_a_file_may_state_its_order(order, states, load):
    state = states["swinunetr"]
    assert order_of(load, {"state_dict": state, "merge_order": order}) == (order, [])
    assert order_of(load, {"state_dict": state | {"merge_order": order}}) == (order, [])
    old = {"state_dict": state, "merge_order": "old"}
    message = "merge_order 'old': expected published or monai1.5"
    assert_refused(load, small("swinunetr"), old, message)


# ---- the report, and what the weights expect
def test_report_is_a_table_and_json(states, load):
    state = prefixed("module.backbone.")(states["unet"])
    heads = {"module.organ_embedding": torch.ones(32, 512), "module.GAP.0.bias": torch.ones(3)}
    report = load(small("unet"), {"net": state | heads})
    again = LoadReport(**json.loads(json.dumps(report.to_dict())))
    assert str(again) == str(report)
    lines = {line[2:14].strip(): line[14:].strip() for line in str(report).splitlines()[1:]}
    assert "SuPreM" in lines["origin"] and lines["found at"] == "net.backbone"
    assert lines["encoder"] == "56 of 56 tensors" and lines["decoder"] == "48 of 48 tensors"
    assert lines["left random"] == "none" and "organ_embedding" in lines["not used"]
    assert lines["trained on"].startswith("CT; spacing [1.5, 1.5, 1.5] mm; HU [-175, 250]")


def config(*overrides):
    return parse_command_line(list(overrides), CONFIG, DinoConfig, IMPOSSIBLE)[0]


def expecting(**expected):
    return LoadReport("x.pt", "X", "", (1, 1), (0, 0), expected_input=expected)


def test_input_is_compared_with_the_config():
    suprem = {"spacing": [1.5, 1.5, 1.5], "hu_window": [-175, 250], "modality": "CT"}
    suprem["crop"] = [96, 96, 96]
    agreeing = config("data.hu_window=[-175.0, 250]", "data.modality=CT")
    assert compare_input(expecting(**suprem), agreeing) == []
    found = compare_input(expecting(**suprem), config("data.spacing=[1,1,1]", "data.modality=MR"))
    settings = [x.rpartition("set ")[2] for x in found]
    assert settings == [
        "data.spacing=[1.5,1.5,1.5]",
        "data.hu_window=[-175,250]",
        "data.modality=CT",
    ]
    native = compare_input(expecting(spacing=[1, 1, 1]), config("data.spacing=native"))
    assert len(native) == 1 and native[0].startswith("data.spacing is native")
    crop = compare_input(expecting(crop=[64, 64, 32]), config())
    assert crop[0].endswith("set crops.global_size=[64,64,32]")
    assert compare_input(expecting(note="each volume was z-scored"), config())[0].endswith(
        "z-scored"
    )
    assert compare_input(LoadReport("x.pt", "X", "", (1, 1), (0, 0)), config()) == []
    (found,) = compare_input(expecting(channels=["t1", "t2"]), config("data.channels=[t2,t1]"))
    assert "data.channels is [t2, t1]" in found and found.endswith("set data.channels=[t1,t2]")


def test_settings_that_a_warning_names_are_those_of_the_config():
    """What it says to set can be given on the command line."""
    everything = {"spacing": [1, 1, 2], "hu_window": [-5, 5], "percentiles": [1, 99]}
    found = compare_input(expecting(**everything, crop=[64, 64, 64]), config())
    settings = [x.rpartition("set ")[2] for x in found]
    assert len(settings) == 4
    assert compare_input(expecting(**everything, crop=[64, 64, 64]), config(*settings)) == []


def test_our_files_hand_over_patients_and_input(states, load):
    content = {
        "format": 1,
        "settings": {"stage": "dino"},
        "config": {"experiment": "e", "data": {"spacing": "native", "modality": "MR"}},
        "seen_patients": ["a1", "b2"],
        "step": 7,
        "backbone": states["unet"],
    }
    report = load(small("unet"), content)
    assert report.origin == "this repository: dino run 'e', step 7"
    assert report.seen_patients == ["a1", "b2"]
    assert report.expected_input == {"spacing": "native", "modality": "MR"}


@pytest.mark.parametrize("axes", [(0, 1, 2), [0, 1], None])
def test_nnunet_is_known_by_its_mirroring_axes(axes, states, load):
    """A tuple of numbers, as nnU-Net saves it; None of trainers without mirroring."""
    content = {"network_weights": states["resunet"], "inference_allowed_mirroring_axes": axes}
    assert load(small("resunet"), content).origin == "nnU-Net"
