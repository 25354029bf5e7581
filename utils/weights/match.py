"""Find the tensors of a backbone in a file of weights.

Names are compared from their ends. Each tensor whose name and shape fit votes for the prefix before
its name, and the prefix with the most votes wins, so that no layout needs a rule of its own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

ENOUGH = 0.95  # of the encoder's tensors
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
RENAMES = (
    (r"\.mlp\.fc([12])\.", r".mlp.linear\1."),  # model_swinvit.pt: from before Swin came to MONAI
    (r"(^|\.)layers([1-4])\.0\.0\.", r"\1layers\2.0."),  # ssl_pretrained_weights.pth
    (r"\.all_modules\.0\.", ".conv."),  # the second name of each layer in nnU-Net's networks
    (r"\.all_modules\.1\.", ".norm."),
)
INDEX = "relative_position_index"  # follows from the window's size; never loaded
BOOKKEEPING = (INDEX, "num_batches_tracked")  # not weights, so they may be missing
Tensors = Mapping[str, torch.Tensor]


@dataclass
class Match:
    """What was found in a file.

    used: {tensor of ours: name in the file}.
    container: the prefix of the encoder's names in the file.
    adapted: tensors of ours, among the used, that have another number of input channels there.
    other_shape: {tensor of ours: name in the file} if the shapes differ in any other way.
    extra: layers in the file that ours does not have, a sign of another network.
    """

    used: dict[str, str] = field(default_factory=dict)
    container: str = ""
    adapted: list[str] = field(default_factory=list)
    other_shape: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)


# ---- names
def leaves(content: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors, and all else, in nested dicts and lists by their dotted names."""
    tensors, others, stack, seen = {}, {}, [("", content)], set()
    while stack:
        name, value = stack.pop()
        if isinstance(value, Mapping | list | tuple):
            if id(value) in seen:  # the same dict under two names, or within itself
                continue
            seen.add(id(value))
            if not isinstance(value, Mapping):
                others[name] = value
            items = value.items() if isinstance(value, Mapping) else _nested_items(value)
            stack += [(f"{name}.{key}" if name else str(key), x) for key, x in reversed(items)]
        elif isinstance(value, torch.Tensor) and _is_plain(value):
            tensors[name] = value
        else:
            others[name] = value
    return tensors, others


def _nested_items(values: list | tuple) -> list[tuple[int, Any]]:
    """Return what may hold tensors in a list, which may be a long list of numbers."""
    kinds = (Mapping, list, tuple, torch.Tensor)
    return [(i, x) for i, x in enumerate(values) if isinstance(x, kinds)]


def _is_plain(tensor: torch.Tensor) -> bool:
    dense = tensor.layout == torch.strided and not tensor.is_nested
    return dense and not (tensor.is_quantized or tensor.is_complex() or tensor.is_meta)


def unwrapped(name: str) -> str:
    """Remove from a name the parts that DDP, torch.compile, FSDP and the like put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def plain(name: str) -> str:
    """Return a name without such parts and with our names for layers."""
    name = unwrapped(name)
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Split a.b.c into ("", a.b.c), (a, b.c) and (a.b, c)."""
    parts = name.split(".")
    return ((".".join(parts[:i]), ".".join(parts[i:])) for i in range(len(parts)))


# ---- matching
def find(tensors: Tensors, targets: Tensors, names) -> Match:
    """Find where in the file the encoder and the decoder are, and which tensor goes where.

    A teacher is preferred to a student. The decoder is looked for where the encoder is and in the
    containers around it.

    Args:
        tensors: those of the file, by their full names.
        targets: those of the backbone.
        names: the backbone, for its encoder_names, roots, layer_names and input_layers.
    """
    of_encoder = names.encoder_names
    places = {}  # (prefix in the file, prefix of ours that it leaves out) -> {target: name in file}
    by_name = {}
    for raw in sorted(tensors, key=lambda raw: plain(raw) != raw):  # without renaming first
        name = plain(raw)
        by_name.setdefault(name, raw)
        for head, tail in _splits(name):
            for root in names.roots:
                target = targets.get(root + tail)
                if target is not None and _fits(tensors[raw], target, tail):
                    places.setdefault((head, root), {}).setdefault(root + tail, raw)
    encoders = {p: sum(x.startswith(of_encoder) for x in found) for p, found in places.items()}
    decoders = {p: len(found) - encoders[p] for p, found in places.items()}
    most = max(encoders.values(), default=0)
    if most == 0:
        return Match()

    def decoder_of(head):
        """Return the place at or above `head` with most of the decoder, or else the nearest."""
        above = [p for p in places if f"{head}.".startswith(f"{p[0]}." if p[0] else "")]
        return max(above, key=lambda p: (decoders[p], len(p[0])))

    def preference(place):
        head = place[0]
        network = ("teacher" in head) - ("student" in head)
        return network, encoders[place], decoders[decoder_of(head)], -len(head)

    encoder = max((p for p in places if encoders[p] >= ENOUGH * most), key=preference)
    decoder = decoder_of(encoder[0])
    match = Match(container=encoder[0])
    match.used = {x: raw for x, raw in places[encoder].items() if x.startswith(of_encoder)}
    match.used |= {x: raw for x, raw in places[decoder].items() if not x.startswith(of_encoder)}
    for name in [x for x in targets if x not in match.used and not x.endswith(BOOKKEEPING)]:
        head, root = encoder if name.startswith(of_encoder) else decoder
        raw = by_name.get(f"{head}.{name.removeprefix(root)}".removeprefix("."))
        if raw is None:
            continue
        if name in names.input_layers and _differ_in_channels(tensors[raw], targets[name]):
            match.used[name] = raw
            match.adapted.append(name)
        else:
            match.other_shape[name] = raw
    head, root = encoder
    inside = [x.removeprefix(f"{head}.") for x in by_name if not head or x.startswith(f"{head}.")]
    match.extra = [root + x for x in inside if (root + x).startswith(names.layer_names)]
    match.extra = [x for x in match.extra if x not in targets]
    # Only the kernels of nnU-Net's decoder show the strides of its encoder; ours are all 2.
    ups = [x for x in by_name if re.search(r"(^|\.)decoder\.transpconvs\.\d+\.weight$", x)]
    match.extra += [x for x in ups if tensors[by_name[x]].shape[2:] != (2, 2, 2)]
    return match


def _fits(tensor: torch.Tensor, target: torch.Tensor, name: str) -> bool:
    same_kind = tensor.is_floating_point() == target.is_floating_point() or name.endswith(INDEX)
    return tensor.shape == target.shape and same_kind


def _differ_in_channels(tensor: torch.Tensor, target: torch.Tensor) -> bool:
    one, two = list(tensor.shape), list(target.shape)
    return len(one) == len(two) and one[:1] + one[2:] == two[:1] + two[2:] and one[1] > 0


def to_channels(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Change weights (out, C, x, y, z) to another number of input channels.

    They are repeated and divided by the number of repeats, or added up, so that an image whose
    channels are all equal gives the same output as before (as Carreira and Zisserman 2017, arXiv
    1705.07750, section 2.3, repeat the kernels of images along the time of videos).
    """
    given = weight.shape[1]
    if channels < given:
        shape = (weight.shape[0], channels, *weight.shape[2:])
        return weight.new_zeros(shape).index_add_(1, torch.arange(given) % channels, weight)
    source = torch.arange(channels) % given
    repeats = torch.bincount(source)[source].view(1, -1, *[1] * (weight.ndim - 2))
    return weight[:, source] / repeats


def unused(tensors: Tensors, match: Match, roots: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names of tensors that repeat a used one, and of all others that are not used."""
    duplicates, ignored, used = [], [], set(match.used.values())
    for raw in [raw for raw in tensors if raw not in used]:
        targets = [root + tail for _, tail in _splits(plain(raw)) for root in roots]
        again = [tensors[match.used[x]] for x in targets if x in match.used]
        same = any(_same(tensors[raw], tensor) for tensor in again)
        (duplicates if same else ignored).append(raw)
    return duplicates, ignored


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return one.data_ptr() == two.data_ptr() or torch.equal(one, two)
