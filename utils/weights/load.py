"""Load a backbone from published weights or from a run of ours, whatever the layout of the file.

utils/tensor_files.py reads the file, utils/weights/match.py finds the tensors in it, and
utils/weights/origins.py knows the published files and the input that they expect.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.checkpoint import FORMAT
from utils.tensor_files import WeightsError, read
from utils.weights import match as match_names
from utils.weights.match import BOOKKEEPING, ENOUGH, INDEX, Match, plain, unwrapped
from utils.weights.origins import fitting_backbone, recognise

_AGES = {  # WeightsFile.recent
    True: "the file was written by PyTorch 2.7 or later",
    False: "the file was written by PyTorch before 2.7",
    None: "the file does not say how old it is",
}
SHARED_INPUT = ("channels", "spacing", "hu_window", "percentiles")  # keys of data
INPUT_TEXTS = {
    "modality": "{}",
    "channels": "channels {}",
    "spacing": "spacing {} mm",
    "hu_window": "HU {} to 0..1",
    "percentiles": "percentiles {} to 0..1",
    "crop": "crops {}",
    "note": "{}",
}


@dataclass
class LoadReport:
    """What was loaded, and from where. str() gives a table, to_dict() JSON.

    origin: the published file or the run of ours that was recognised.
    container: the prefix of the encoder's names in the file.
    encoder, decoder: number of tensors loaded, and of tensors that the backbone has.
    adapted: tensors that were changed to another number of input channels; channels: how many
        there are in the file and in the backbone, if they differ.
    left_random: tensors of the backbone that keep their initial values.
    random_in: how many of these are in the encoder and in the decoder.
    ignored: tensors of the file that are not used.
    duplicates: tensors of the file that repeat a used one.
    merge_order: that of a Swin UNETR. seen_patients: hashes, from files of ours.
    expected_input: as in `origins.Origin`, or from the data settings of ours; None if not known.
    warnings: what the user should look at; callers add those of `compare_input`.
    """

    file: str
    origin: str
    container: str
    encoder: tuple[int, int]
    decoder: tuple[int, int]
    adapted: list[str] = field(default_factory=list)
    channels: tuple[int, int] | None = None
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
        """Return the rows of the table as {name: text}."""
        rows = {
            "file": self.file,
            "origin": self.origin,
            "found at": self.container or "top level",
            "encoder": _counts(*self.encoder, self.random_in[0]),
            "decoder": _counts(*self.decoder, self.random_in[1]),
            "left random": _summary(self.left_random),
            "not used": _summary(self.ignored),
            "duplicates": _summary(self.duplicates),
            "other channels": self._adapted(),
            "patch merging": f"order {self.merge_order}" if self.merge_order else "",
            "trained on": _input_text(self.expected_input),
        }
        optional = ("duplicates", "other channels", "patch merging")
        return {name: text or "none" for name, text in rows.items() if text or name not in optional}

    def _adapted(self) -> str:
        if not self.adapted or not self.channels:
            return _summary(self.adapted)
        given, here = self.channels
        how = "added up" if here < given else "repeated, and divided by the number of repeats"
        return f"{given} in the file, {here} here: {how} in {_summary(self.adapted)}"

    def __str__(self) -> str:
        rows = self.rows()
        width = max(map(len, rows))
        table = [f"  {name:<{width}}  {text}" for name, text in rows.items()]
        return "\n".join(["weights loaded", *table, *(f"  WARNING: {x}" for x in self.warnings)])


def load_backbone(backbone: nn.Module, path: str | Path) -> LoadReport:
    """Load published weights, or the teacher of a run of ours, into a backbone.

    A decoder is loaded if both the backbone and the file have one.

    Args:
        backbone: made by `models.backbones.build_backbone`, not wrapped.
        path: a file written by torch.save or safetensors.
    Raises:
        WeightsError: the file cannot be read, or does not fit, as with less than 95 % of the
            encoder's tensors; it says which backbone the file would fit. The backbone is unchanged.
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
    channels = None
    for name in match.adapted:
        channels = values[name].shape[1], targets[name].shape[1]
        values[name] = match_names.to_channels(values[name], channels[1])
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
        channels=channels,
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
        found, orders = tensors | others, backbone.merge_orders
        report.merge_order = _merge_order(report, file.recent, ours, origin, found, orders)

    backbone.load_state_dict(targets | values)
    if report.merge_order:
        backbone.merge_order = report.merge_order
    return report


# ---- what the file says of itself
def _describe_ours(report: LoadReport, content: Any) -> bool:
    """Report origin, patients and input if this is a checkpoint of ours; return whether it is."""
    if not (isinstance(content, dict) and content.get("format") == FORMAT):
        return False
    config, settings = content.get("config"), content.get("settings")
    if not (isinstance(config, dict) and isinstance(settings, dict)):
        return False
    data, seen = config.get("data", {}), content.get("seen_patients", [])
    run = f"{settings.get('stage')} run {config.get('experiment')!r}, step {content.get('step')}"
    if labels := content.get("chosen_by"):
        run += f", an epoch chosen by the labels {', '.join(labels)}"
    report.origin = f"this repository: {run}"
    report.seen_patients = list(seen)
    report.expected_input = {key: data[key] for key in SHARED_INPUT if data.get(key)}
    if data.get("modality", "auto") != "auto":
        report.expected_input["modality"] = data["modality"]
    return True


def _merge_order(report, recent: bool | None, ours: bool, origin, found: dict, orders: dict) -> str:
    """Return the order in which the file's Swin concatenates neighbours; names do not show it."""
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
        return "monai1.5"  # a state_dict of ours states any other
    # MONAI 1.5 is younger than PyTorch 2.7. A file of unknown origin that was written since then is
    # most likely of a MONAI of today, but it may be an old one that was saved again.
    published = bool(origin and origin.published)
    order = "published" if published or recent is False else "monai1.5"
    if not published or (recent and origin.out is not None):
        why = f"the layout is that of {origin.name}" if published else _AGES[recent]
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
    """Shorten names to their common beginnings, with counts: 13: organ_embedding, GAP (4), ..."""
    if not names:
        return ""
    parts = [unwrapped(name).split(".") for name in names]
    few = (d for d in range(6, 0, -1) if len({tuple(p[:d]) for p in parts}) <= 6)
    depth = next(few, 1)
    counts = Counter(".".join(p[:depth]) for p in parts).most_common()
    shown = [f"{name} ({n})" if n > 1 else name for name, n in counts[:6]]
    return f"{len(names)}: {', '.join(shown + ['...'] * (len(counts) > 6))}"


def _text(value: Any) -> str:
    """Write numbers as [1.5, 1.5, 2], of whatever type they are."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{', '.join(x if isinstance(x, str) else f'{x:g}' for x in value)}]"
    return str(value)


def _input_text(expected: dict | None) -> str:
    if not expected:
        return "not known"
    return "; ".join(INPUT_TEXTS[key].format(_text(value)) for key, value in expected.items())


def _misfit(path, backbone, tensors, targets, needed, match: Match) -> str:
    """Say why a file cannot be used: what was found, what was expected, what it would fit."""
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
    """Return a warning for each key of a config that gives the weights another input than they had.

    cfg: the config of any stage.
    """
    expected, config = report.expected_input or {}, cfg.model_dump(mode="json")
    sections = {name: config.get(name) or {} for name in ("data", "crops", "patches")}
    found = {f"{name}.{key}": x for name, section in sections.items() for key, x in section.items()}
    wanted = {f"data.{key}": expected.get(key) for key in SHARED_INPUT}
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
