"""Loading a backbone from published weights or from a run of ours, whatever the file's layout.

utils/tensor_files.py reads the file, utils/weights/match.py finds the tensors in it, and
utils/weights/origins.py knows the published files and the input they expect.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.checkpoint import FORMAT
from utils.tensor_files import WeightsError, WeightsFile, read
from utils.weights import match as match_names
from utils.weights.match import BOOKKEEPING, ENOUGH, INDEX, Match, plain, unwrapped
from utils.weights.origins import Origin, fitting_backbone, recognise

_AGES = {  # WeightsFile.recent
    True: "the file was written by PyTorch 2.7 or later",
    False: "the file was written by PyTorch before 2.7",
    None: "the file does not say how old it is",
}
INPUT_TEXTS = {
    "modality": "{}",
    "spacing": "spacing {} mm",
    "hu_window": "HU {} to 0..1",
    "percentiles": "percentiles {} to 0..1",
    "crop": "crops {}",
    "note": "{}",
}


@dataclass
class LoadReport:
    """What was loaded from where. str() is a table, to_dict() JSON.

    origin: the published file or run recognised. container: where in the file the encoder is.
    encoder, decoder: tensors loaded and tensors there are. adapted: to other input channels.
    left_random: tensors of the backbone that keep their initial values; random_in: how many of them
        are in encoder and decoder.
    ignored: tensors of the file that are not used; duplicates: those that hold a used one again.
    merge_order: of a Swin UNETR. seen_patients: hashes, from files of ours.
    expected_input: of `origins.Origin`, or data settings of ours; None where not known.
    warnings: what to look at; callers add those of `compare_input`.
    """

    file: str
    origin: str
    container: str
    encoder: tuple[int, int]
    decoder: tuple[int, int]
    adapted: list[str] = field(default_factory=list)
    left_random: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    random_in: tuple[int, int] = (0, 0)
    merge_order: str | None = None
    seen_patients: list[str] = field(default_factory=list)
    expected_input: dict | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        pairs = {name: list(getattr(self, name)) for name in ("encoder", "decoder", "random_in")}
        return asdict(self) | pairs

    def rows(self) -> dict[str, str]:
        """The table, {name: text}."""
        rows = {
            "file": self.file,
            "origin": self.origin,
            "found at": self.container or "top level",
            "encoder": _counts(*self.encoder, self.random_in[0]),
            "decoder": _counts(*self.decoder, self.random_in[1]),
            "left random": _summary(self.left_random),
            "not used": _summary(self.ignored),
            "duplicates": _summary(self.duplicates),
            "other channels": _summary(self.adapted),
            "patch merging": f"order {self.merge_order}" if self.merge_order else "",
            "trained on": _input_text(self.expected_input),
        }
        optional = ("duplicates", "other channels", "patch merging")
        return {name: text or "none" for name, text in rows.items() if text or name not in optional}

    def __str__(self) -> str:
        rows = self.rows()
        width = max(map(len, rows))
        table = [f"  {name:<{width}}  {text}" for name, text in rows.items()]
        return "\n".join(["weights loaded", *table, *(f"  WARNING: {x}" for x in self.warnings)])


def load_backbone(backbone: nn.Module, path: str | Path) -> LoadReport:
    """Load published weights, or a run of ours (its teacher), into a backbone.

    A decoder is loaded where the backbone has one and the file too. Where less than 95 % of the
    encoder's tensors are in the file, the backbone stays as it is.

    Args:
        backbone: of `models.backbones.build_backbone`, not wrapped.
        path: a file of torch.save or safetensors.
    Raises:
        WeightsError: unreadable file, or one that does not fit, saying which backbone it would fit.
    """
    file = read(path)
    tensors, others = match_names.leaves(file.content)
    shapes = {unwrapped(raw): tuple(x.shape) for raw, x in tensors.items()}
    origin = recognise(shapes | {unwrapped(raw): None for raw in others})
    targets = {name: x for name, x in backbone.state_dict().items() if name != "merge_order"}
    match = match_names.find(tensors, targets, backbone)

    encoder = [name for name in targets if name.startswith(backbone.encoder_names)]
    decoder = [name for name in targets if name not in encoder]
    needed = [name for name in encoder if not name.endswith(BOOKKEEPING)]
    random = [name for name in needed if name not in match.used]
    too_few = len(random) > (1 - ENOUGH) * len(needed)
    if too_few or match.extra or any(name in match.other_shape for name in needed):
        raise WeightsError(_misfit(path, backbone, tensors, targets, needed, match))
    values = {x: tensors[raw] for x, raw in match.used.items() if not x.endswith(INDEX)}
    for name in match.adapted:
        values[name] = match_names.to_channels(values[name], targets[name].shape[1])
    broken = [name for name, x in values.items() if not torch.isfinite(x.float()).all()]
    if broken:
        raise WeightsError(f"{path}: NaN or infinite values in {_summary(broken)}")

    missing = [name for name in targets if name not in match.used]
    left_random = [name for name in missing if not name.endswith(BOOKKEEPING)]
    duplicates, ignored = match_names.unused(tensors, match, backbone.roots)
    report = LoadReport(
        file=str(path),
        origin=origin.name if origin else "not one of the published files known here",
        container=match.container,
        encoder=(sum(name in match.used for name in encoder), len(encoder)),
        decoder=(sum(name in match.used for name in decoder), len(decoder)),
        adapted=match.adapted,
        left_random=left_random,
        random_in=(len(random), len(left_random) - len(random)),
        ignored=ignored,
        duplicates=duplicates,
        expected_input=origin.expects if origin else None,
    )
    if random:
        report.warnings.append(f"not in the file, random in the encoder: {_summary(random)}")
    if match.other_shape:
        what = f"of another shape in the file, left random: {_summary(match.other_shape)}"
        report.warnings.append(what)
    if "student" in match.container:
        report.warnings.append("no teacher in the file fits: these are the student's weights")
    ours = _describe_ours(report, file.content)
    if hasattr(backbone, "merge_order"):
        report.merge_order = _merge_order(
            report, file, ours, origin, tensors | others, backbone.merge_orders
        )

    backbone.load_state_dict(targets | values)
    if report.merge_order:
        backbone.merge_order = report.merge_order
    return report


# ---- what the file says of itself
def _describe_ours(report: LoadReport, content: Any) -> bool:
    """Origin, patients and input of a checkpoint of this repository; whether it is one."""
    if not (isinstance(content, dict) and content.get("format") == FORMAT):
        return False
    config, settings = content.get("config"), content.get("settings")
    if not (isinstance(config, dict) and isinstance(settings, dict)):
        return False
    data, seen = config.get("data", {}), content.get("seen_patients", [])
    run = f"{settings.get('stage')} run {config.get('experiment')!r}, step {content.get('step')}"
    report.origin = f"this repository: {run}"
    report.seen_patients = list(seen)
    keys = ("spacing", "hu_window", "percentiles")
    report.expected_input = {key: data[key] for key in keys if key in data}
    if data.get("modality", "auto") != "auto":
        report.expected_input["modality"] = data["modality"]
    return True


def _merge_order(
    report: LoadReport,
    file: WeightsFile,
    ours: bool,
    origin: Origin | None,
    found: dict,
    orders: dict,
) -> str:
    """In which order the file's Swin concatenates neighbours. Names and shapes do not show it."""
    places = ("merge_order", f"{report.container}.merge_order")
    stated = [x for raw, x in found.items() if unwrapped(raw) in places]
    if stated:
        order = stated[0].tolist() if isinstance(stated[0], torch.Tensor) else stated[0]
        order = next((name for name, value in orders.items() if value == order), order)
        if order not in orders:
            what = f"merge_order {order!r}: expected published or monai1.5"
            raise WeightsError(f"{report.file}: {what}")
        return order
    if ours:
        return "monai1.5"  # a state_dict of ours says so where it is another
    # MONAI 1.5 is younger than PyTorch 2.7. A file written since then by none of the known is most
    # likely of a MONAI of today, but it may be an old one that was saved again.
    published = bool(origin and origin.published)
    order = "published" if published or file.recent is False else "monai1.5"
    if not published or (file.recent and origin.out is not None):
        why = f"the layout is that of {origin.name}" if published else _AGES[file.recent]
        other = "monai1.5" if order == "published" else "published"
        report.warnings.append(
            f"order of patch merging ASSUMED to be {order}, as {why}: MONAI changed it in 1.5, and "
            "names and shapes do not show which one a network was trained with. The wrong one "
            f"spoils the features; if {other} is right, save the file again with the entry "
            f"merge_order={other!r} beside the weights"
        )
    return order


# ---- texts
def _counts(loaded: int, total: int, random: int) -> str:
    if not total:
        return "not built"
    rest = total - loaded - random  # BOOKKEEPING
    more = f"; {rest} more are buffers without weights" if rest and loaded else ""
    return f"{loaded} of {total} tensors{more}"


def _size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def _summary(names: Collection[str]) -> str:
    """Names by their common beginnings, with counts: 13: organ_embedding, GAP (4), ..."""
    if not names:
        return ""
    parts = [unwrapped(name).split(".") for name in names]
    few = (d for d in range(6, 0, -1) if len({tuple(p[:d]) for p in parts}) <= 6)
    depth = next(few, 1)
    counts = Counter(".".join(p[:depth]) for p in parts).most_common()
    shown = [f"{name} ({n})" if n > 1 else name for name, n in counts[:6]]
    return f"{len(names)}: {', '.join(shown + ['...'] * (len(counts) > 6))}"


def _text(value: Any) -> str:
    """[1.5, 1.5, 2] for numbers however they are written."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(f'{x:g}' for x in value)}]"
    return str(value)


def _input_text(expected: dict | None) -> str:
    if not expected:
        return "not known"
    return "; ".join(INPUT_TEXTS[key].format(_text(value)) for key, value in expected.items())


def _misfit(path, backbone, tensors, targets, needed, match: Match) -> str:
    """Why a file cannot be used: what was found, what was expected, what it would fit."""
    if not tensors:
        return f"{path}: holds no tensors"
    shapes = {plain(raw): tuple(x.shape) for raw, x in tensors.items()}
    missing = [name for name in needed if name not in match.used]

    def listed(names, sizes):
        shown = [f"{name} {_size(sizes[name])}" for name in names[:3]]
        return ", ".join(shown + ["..."] * (len(names) > 3))

    lines = [
        f"{path}: does not fit this {type(backbone).__name__.lower()}: the file has "
        f"{len(needed) - len(missing)} of the {len(needed)} tensors of its encoder by name and "
        f"shape (at least {ENOUGH:.0%} are needed, and none of another shape)",
        f"  found     {len(tensors)} tensors: {listed(list(tensors), tensors)}",
    ]
    if missing:
        lines.append(f"  expected  {listed(missing, targets)} ({len(missing)} missing)")
    if match.extra:
        lines.append(f"  unlike    layers that it does not have: {_summary(match.extra)}")
    for target, raw in list(match.other_shape.items())[:3]:
        sizes = f"{_size(tensors[raw])} in the file, {_size(targets[target])} here"
        lines.append(f"  differs   {target}: {sizes}")
    return "\n".join([*lines, f"  fits      {fitting_backbone(shapes)}"])


# ---- what the weights expect of the input
def compare_input(report: LoadReport, cfg) -> list[str]:
    """Where the config feeds the network otherwise than it was trained, naming the keys to change.

    Args:
        cfg: any of the config files' models.
    """
    expected, config = report.expected_input or {}, cfg.model_dump(mode="json")
    sections = {name: config.get(name) or {} for name in ("data", "crops", "patches")}
    found = {f"{name}.{key}": x for name, section in sections.items() for key, x in section.items()}
    wanted = {f"data.{key}": expected.get(key) for key in ("spacing", "hu_window", "percentiles")}
    wanted["data.modality"] = expected.get("modality") if found["data.modality"] != "auto" else None
    wanted |= {key: expected.get("crop") for key in ("crops.global_size", "patches.size")}
    warnings = []
    for key, value in wanted.items():
        if value is not None and key in found and _text(found[key]) != _text(value):
            setting = f"{key}={_text(value).replace(' ', '')}"
            trained = f"these weights ({report.origin}) were trained with {_text(value)}"
            warnings.append(f"{key} is {_text(found[key])}, but {trained}: set {setting}")
    if "note" in expected:
        warnings.append(f"these weights ({report.origin}): {expected['note']}")
    return warnings
