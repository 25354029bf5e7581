"""Encoders copied out of files, and permuted ones."""

import torch

from models.backbones import build_backbone
from tests.conftest import equal
from utils import checkpoint
from utils.transfer.weights import copy_backbone, permute
from utils.weights import load_backbone

SMALL = {"features": [4, 8], "blocks": [1, 1]}


def encoder(**options):
    return build_backbone("resunet", decoder=False, **SMALL | options)


def saved(path, network):
    """A file of ours that holds the whole network, as of a run that has seen a patient."""
    about = {"settings": {"stage": "dino"}, "config": {"data": {}}, "step": 1}
    checkpoint.save(path, about | {"seen_patients": ["abc"], "backbone": network.state_dict()})
    return path


def test_a_copy_is_the_encoder_alone_and_still_knows_its_patients(tmp_path):
    whole = build_backbone("resunet", **SMALL)
    source = saved(tmp_path / "whole.pt", whole)
    copy_backbone(encoder(), source, tmp_path / "copy.pt")
    target = build_backbone("resunet", **SMALL)
    before = {k: x.clone() for k, x in target.state_dict().items()}
    report = load_backbone(target, tmp_path / "copy.pt")
    assert report.seen_patients == ["abc"] and report.decoder[0] == 0
    for name, x in target.state_dict().items():
        of_encoder = name.startswith(target.encoder_names)
        assert torch.equal(x, (whole.state_dict() if of_encoder else before)[name]), name
    copy_backbone(encoder(), tmp_path / "copy.pt", tmp_path / "again.pt")
    assert equal(*(checkpoint.load(tmp_path / f"{name}.pt") for name in ("copy", "again")))


def test_a_copy_has_the_decoder_where_the_backbone_has_one(tmp_path):
    whole, target = (build_backbone("resunet", **SMALL) for _ in range(2))
    source = saved(tmp_path / "whole.pt", whole)
    copy_backbone(build_backbone("resunet", **SMALL), source, tmp_path / "copy.pt")
    load_backbone(target, tmp_path / "copy.pt")
    assert equal(target.state_dict(), whole.state_dict())


def test_a_permuted_file_loads_and_holds_the_same_numbers_elsewhere(tmp_path):
    torch.manual_seed(0)
    network = encoder()
    for x in network.parameters():
        torch.nn.init.normal_(x)
    source = saved(tmp_path / "a.pt", network)
    for name, seed in (("b", 1), ("c", 1), ("d", 2)):
        permute(source, tmp_path / f"{name}.pt", seed)
    found = encoder()
    assert load_backbone(found, tmp_path / "b.pt").encoder[0] == len(network.state_dict())
    for (name, x), y in zip(network.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(x.flatten().sort()[0], y.flatten().sort()[0]), name
        assert x.numel() < 10 or not torch.equal(x, y), name
    of = {name: checkpoint.load(tmp_path / f"{name}.pt")["backbone"] for name in "bcd"}
    assert equal(of["b"], of["c"]) and not equal(of["b"], of["d"])


def test_whole_numbers_and_the_order_of_patch_merging_stay(tmp_path):
    network = build_backbone("swinunetr", decoder=False, feature_size=12)
    permute(saved(tmp_path / "a.pt", network), tmp_path / "b.pt", 0)
    found = checkpoint.load(tmp_path / "b.pt")["backbone"]
    kept = [k for k, x in network.state_dict().items() if not torch.is_floating_point(x)]
    assert kept and all(torch.equal(found[k], network.state_dict()[k]) for k in kept)
    assert load_backbone(network, tmp_path / "b.pt").merge_order == "monai1.5"
