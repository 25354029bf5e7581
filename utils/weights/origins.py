"""Published files of weights: how each is recognised, and the input its network was trained with.

Names are those in the file with all containers but without the parts of wrappers (see match.py),
such as net.backbone.swinViT.patch_embed.proj.weight.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...] | None]  # None: not a tensor


@dataclass(frozen=True)
class Origin:
    """A published file, or a family of files of one layout.

    has, lacks: regular expressions, each of which some name, or no name, in the file matches.
    out: channels of a Swin UNETR's output layer, given if nothing else tells two files apart.
    expects: the input; any of modality, spacing (mm), hu_window, crop (voxels), note.
    published: whether patch merging in a Swin has the order of MONAI before 1.5.
    """

    name: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    out: int | None = None
    expects: dict | None = None
    published: bool = True

    def fits(self, shapes: Shapes) -> bool:
        if self.out is not None:
            last = next((s for n, s in shapes.items() if n.endswith("out.conv.conv.weight")), None)
            if not last or last[0] != self.out:
                return False
        names = "\n".join(shapes)
        return all(re.search(x, names, re.M) for x in self.has) and not any(
            re.search(x, names, re.M) for x in self.lacks
        )


ABDOMEN = {  # README of SuPreM, supervised; the CLIP-Driven Universal Model has the same
    "modality": "CT",
    "spacing": [1.5, 1.5, 1.5],
    "hu_window": [-175, 250],
    "crop": [96, 96, 96],
}
SSL_HEAD = {  # Project-MONAI/research-contributions, SwinUNETR/Pretrain, which resamples nothing
    "modality": "CT",
    "hu_window": [-1000, 1000],
    "crop": [96, 96, 96],
}
VOCO = {**ABDOMEN, "crop": [64, 64, 64]}  # Luffy03/Large-Scale-Medical, Self-supervised
CT_FM = {  # project-lighter/CT-FM, README
    "modality": "CT",
    "hu_window": [-1024, 2048],
    "note": "its networks were trained with axes in SPL order (feet to head first); volumes here "
    "are RAS, which no key changes",
}
OPENMIND = {  # MIC-DKFZ/nnssl: ZScoreNormalization of each volume, configuration onemmiso
    "modality": "MR",
    "spacing": [1.0, 1.0, 1.0],
    "crop": [160, 160, 160],
    "note": "each of its volumes was z-scored; data.percentiles maps to 0..1 here. The instance "
    "normalization after the first convolution takes most of the difference away",
}
GENESIS = {"modality": "CT", "hu_window": [-1000, 1000], "crop": [64, 64, 32]}  # its README
BTCV = {**ABDOMEN, "spacing": [1.5, 1.5, 2.0]}  # research-contributions, SwinUNETR/BTCV

# Networks that no backbone here is. A ViT's patch_embed has 4 axes for images and 5 for volumes.
PLAIN_CONV_UNET = r"stages\.\d+\.\d+\.convs\.\d+\.conv\.weight"
VIT = r"blocks\.(\d+\.)+attn\.qkv\.weight"  # DINOv2 and 3DINO number their blocks within chunks
VITS = {
    4: "a vision transformer for 2D images, such as facebookresearch/dino's",
    5: "a vision transformer for volumes, such as 3DINO's",
}

SWIN, UNET = r"(^|\.)swinViT\.", r"(^|\.)down_tr64\."
ORIGINS = (  # the first that fits is taken
    Origin(
        "SuPreM Swin UNETR", (r"(^|\.)organ_embedding$", r"\.backbone\.swinViT\."), expects=ABDOMEN
    ),
    Origin(
        "CLIP-Driven Universal Model, Swin UNETR",
        (r"(^|\.)organ_embedding$", SWIN),
        expects=ABDOMEN,
    ),
    Origin(
        "SuPreM or CLIP-Driven Universal Model, U-Net (one layout)",
        (r"(^|\.)organ_embedding$", UNET),
        expects=ABDOMEN,
    ),
    Origin(
        "SuPreM SegResNet",
        (r"^net\.convInit\.conv\.weight$", r"^net\.conv_final\.2\."),
        expects=ABDOMEN,
    ),
    Origin(
        "MONAI model_swinvit.pt",
        (r"(^|\.)layers1\.0\.blocks\.0\.mlp\.fc1\.", r"(^|\.)rotation_head\."),
        (SWIN,),
        expects=SSL_HEAD,
    ),
    Origin("MONAI ssl_pretrained_weights.pth", (r"(^|\.)encoder\.layers1\.0\.0\.blocks\.",)),
    Origin(
        "SSLHead of MONAI's research-contributions",
        (SWIN, r"(^|\.)rotation_head\.", r"(^|\.)contrastive_head\."),
        expects=SSL_HEAD,
    ),
    Origin(
        "VoComni",
        (r"^state_dict\.swinViT\.layers1c\.",),
        out=21,
        expects=VOCO | {"crop": [96, 96, 96]},
    ),
    Origin(
        "NVIDIA BTCV Swin UNETR", (r"^state_dict\.swinViT\.",), (r"layers1c",), out=14, expects=BTCV
    ),
    Origin(
        "VoCo SSL head", (r"^swinViT\.layers1c\.", r"^encoder10\."), (r"^decoder5\.",), expects=VOCO
    ),
    Origin(
        "nnU-Net",
        (r"^network_weights\.", r"^inference_allowed_mirroring_axes"),
        expects={"note": "its volumes were resampled and normalised as its nnU-Net plans say"},
    ),
    Origin("OpenMind (nnssl) ResEnc", (r"^network_weights\.encoder\.stem\.",), expects=OPENMIND),
    Origin(
        "CT-FM encoder",
        (r"^conv_init\.weight$", r"^layers\.4\.blocks\.3\..*running_mean$"),
        expects=CT_FM,
    ),
    Origin(
        "CT-FM SegResNetDS",
        (r"^encoder\.conv_init\.weight$", r"^encoder\.layers\.4\.blocks\.3\..*running_mean$"),
        expects=CT_FM,
    ),
    Origin("Models Genesis", (UNET, r"(^|\.)out_tr\.final_conv\."), expects=GENESIS),
    Origin(
        "DINO trained with Lightning (student_backbone, teacher_backbone)",
        (r"(^|\.)student_backbone\.", r"(^|\.)teacher_backbone\."),
        published=False,
    ),
    Origin(
        "DINO, laid out as by facebookresearch/dino",
        (r"^student\.", r"^teacher\."),
        published=False,
    ),
    Origin("DINO, laid out as by 3DINO", (r"^teacher\.backbone\.",), published=False),
)


def recognise(shapes: Shapes) -> Origin | None:
    """Return the origin of a file, by the names and shapes in it; None if it is not known."""
    return next((origin for origin in ORIGINS if origin.fits(shapes)), None)


def fitting_backbone(shapes: Shapes) -> str:
    """Return the settings of the backbone that a file would fit, or why there is none."""
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    if (shape := _shape(shapes, r"patch_embed\.proj\.weight")) and _shape(shapes, r"layers1\..*"):
        use_v2 = str(_shape(shapes, r"layers1c\..*") is not None).lower()
        options = f"swinunetr.feature_size={shape[0]} swinunetr.use_v2={use_v2}"
        return f"backbone=swinunetr {options}"
    if stages := _stages(shapes, r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv1\.conv\.weight"):
        features, blocks = ([x[i] for x in stages] for i in (0, 1))
        return f"backbone=resunet resunet.features={features} resunet.blocks={blocks}"
    if shape := _shape(shapes, r"down_tr64\.ops\.1\.conv1\.weight"):
        return f"backbone=unet unet.feature_size={shape[0]}"
    for variant, first, convs in (
        ("standard", r"convInit\.conv\.weight", r"down_layers\.(\d+)\.(\d+)\.conv1\.conv\.weight"),
        ("ds", r"conv_init\.weight", r"layers\.(\d+)\.blocks\.(\d+)\.conv1\.weight"),
    ):
        if (shape := _shape(shapes, first)) and (stages := _stages(shapes, convs)):
            blocks = [count for _, count in stages]
            options = f"segresnet.feature_size={shape[0]} segresnet.blocks={blocks}"
            return f"backbone=segresnet segresnet.variant={variant} {options}"
    if _shape(shapes, PLAIN_CONV_UNET):
        return "none: this is nnU-Net's PlainConvUNet; resunet is its residual encoder U-Net"
    if _shape(shapes, VIT):
        patches = _shape(shapes, r"patch_embed\.proj\.weight") or ()
        return f"none: this is {VITS.get(len(patches), 'a vision transformer')}"
    return "none that is known here"


def _shape(shapes: Shapes, pattern: str) -> tuple[int, ...] | None:
    """Return the shape of the first tensor whose name, after any prefix, matches `pattern`."""
    full = re.compile(rf"(.*\.)?{pattern}")
    return next((shape for name, shape in shapes.items() if full.fullmatch(name)), None)


def _stages(shapes: Shapes, pattern: str) -> list[tuple[int, int]]:
    """Return (channels, blocks) of each stage; the pattern's groups are the stage and the block."""
    full, found = re.compile(rf"(.*\.)?{pattern}"), {}
    for name, shape in shapes.items():
        if match := full.fullmatch(name):
            stage, block = (int(x) for x in match.groups()[-2:])
            found.setdefault(stage, {})[block] = shape[0]
    return [(found[stage][min(found[stage])], len(found[stage])) for stage in sorted(found)]
