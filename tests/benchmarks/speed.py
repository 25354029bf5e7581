"""Forward, backward and whole DINO steps against plain networks of others, on the same settings.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.speed [ROW ...] [--repeats 5]

Both arms run in one process and by turns. Shown are medians, and the median of the ratios: how many
times as long the other takes. With one thread it is the time of the CPU, so that other programs
disturb less, though they still take cache and bandwidth. Run it with two threads as well. On a GPU
both arms run in bf16, with larger crops and batches; all rows take some minutes there. The loop of
DINO takes AdamW as PyTorch gives it, ours the fused one, as the stages do. Rows:

    check             no times: every fast path beside the plain one on this device; it ends with an
                      error if one differs
    encoder, crops    swinunetr's encoder, forward and backward, against MONAI: a global crop, and
                      a batch of local ones
    swinunetr         with its decoder, 96^3
    dino_swinunetr    a step of student and teacher, against a loop over views with MONAI's
    dino_resunet      likewise, with our resunet in the loop
    memory            the peak of the encoder at 96^3, each in a process of its own
    resunet           against ResidualEncoderUNet, after `pip install --no-deps
                      dynamic-network-architectures`, into an environment of your own
    sizes             ours alone: cost over crop edge, batch, prototypes, channels and windows, to
                      results/benchmarks/sizes.png
"""

import argparse
import contextlib
import copy
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from monai.networks.nets import SwinUNETR
from torch import nn

from models.backbones import build_backbone
from models.common import with_fast_layers
from models.dino import DINOHead, DINONetwork, update_teacher
from models.losses import TeacherTargets, dino_loss
from models.windows import attend, attend_plainly
from tests.benchmarks.sliding_window import timed

REPEATS = 5
ON_GPU = torch.cuda.is_available()
IN_BF16 = ON_GPU
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
GLOBAL, LOCAL, BATCH = (96, 48, 4) if ON_GPU else (64, 32, 1)  # edges of crops; cases
PROTOTYPES, TEACHER_TEMP, STUDENT_TEMP, MOMENTUM = 4096, 0.04, 0.1, 0.99


def compare(name: str, ours, other) -> None:
    """Run both by turns and print their times."""
    times = []
    for _ in range(REPEATS + 1):
        times.append([timed(run, DEVICE)[0] for run in (ours, other)])
    times = times[1:]  # the first warms up
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(other / ours for ours, other in times)
    threads = torch.get_num_threads()
    print(f"{name}, {DEVICE}, {threads} threads: ours {a:.3f} s, other {b:.3f} s, {ratio:.2f}x")


def cube(size: int, batch: int = BATCH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 1, size, size, size, generator=generator).to(DEVICE)


def autocast() -> contextlib.AbstractContextManager:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=IN_BF16)


def forward_backward(network, x: torch.Tensor):
    def run():
        with autocast():
            out = network(x)
        out = out if isinstance(out, list) else [out]
        sum(y.float().square().mean() for y in out).backward()

    return run


def swin_pair(decoder: bool) -> tuple[nn.Module, SwinUNETR]:
    """Return our swinunetr and MONAI's, with the same weights."""
    torch.manual_seed(0)
    monai = SwinUNETR(in_channels=1, out_channels=2, feature_size=48)
    ours = build_backbone("swinunetr", decoder=decoder)
    ours.load_state_dict({name: monai.state_dict()[name] for name in ours.state_dict()})
    return ours.to(DEVICE), monai.to(DEVICE)


def check() -> None:
    """Compare the fast paths with plain ones: outputs, and gradients in float64."""
    global IN_BF16
    IN_BF16 = False
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        parts = attention, layers, swin_encoder, dino_steps
        if not all([well for part in parts for well in part()]):
            sys.exit("a fast path differs from the plain one")
    IN_BF16 = ON_GPU


def attention():
    torch.manual_seed(0)
    shapes = (3, 8, 49, 16), (3, 8, 50, 16), (3, 8, 50, 16), (3, 49, 50)
    q, k, v, bias = tensors = [torch.randn(n, device=DEVICE, requires_grad=True) for n in shapes]
    plain = torch.softmax(q @ k.transpose(-1, -2) / 4 + bias[:, None], -1) @ v
    expected = torch.autograd.grad(plain.cos().sum(), tensors)
    for path in (attend, attend_plainly):
        out = path(*tensors, 0.25)
        yield difference(f"attention, {path.__name__}", out, plain)
        grads = torch.autograd.grad(out.cos().sum(), tensors)
        yield worst(f"attention, {path.__name__}, gradients", zip(grads, expected, strict=True))


def layers():
    parts = nn.InstanceNorm3d(3, affine=True), nn.LeakyReLU(inplace=True), nn.Conv3d(3, 5, 1)
    plain = nn.Sequential(*parts).to(DEVICE).double()
    for p in plain.parameters():  # those of a norm are 1 and 0, which hides mistakes
        nn.init.normal_(p)
    out, x = [], cube(8, 6).double().view(2, 3, 8, 8, 8)
    for network in (with_fast_layers(copy.deepcopy(plain)), plain):
        y = network(x)
        out.append([y, *torch.autograd.grad(y.cos().sum(), network.parameters())])
    yield worst("norm and 1x1x1 convolution, float64, with gradients", zip(*out, strict=True))


def swin_encoder():
    for dtype in (torch.float32, torch.float64):
        ours, monai = (network.to(dtype) for network in swin_pair(decoder=False))
        x, grads = cube(GLOBAL, 1).to(dtype), []
        maps = ours.encode(x), monai.swinViT(x)
        for network, out in zip((ours, monai), maps, strict=True):
            sum(y.square().mean() for y in out).backward()
            grads.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
        yield worst(f"swinunetr against MONAI, {dtype}, maps", zip(*maps, strict=True))
        if dtype == torch.float64:
            pairs = [(grad, grads[1][name]) for name, grad in grads[0].items()]
            yield worst("swinunetr against MONAI, float64, gradients", pairs)


def dino_steps():
    """Compare the losses of some steps of both arms: what one gets wrong changes the next."""
    ours = build_backbone("resunet", decoder=False, features=[8, 16], blocks=[1, 1])
    views = cube(16, 4).split(2), cube(8, 16).split(2)  # of two cases
    arms = step_pair(ours, Encode(copy.deepcopy(ours)), *views)
    losses = torch.tensor([[arm().item() for arm in arms] for _ in range(8)])
    yield difference(f"DINO, losses of {len(losses)} steps", *losses.T)


def worst(name: str, pairs) -> bool:
    """Print the largest `difference` of several pairs of ours and other."""
    return difference(name, *max(pairs, key=lambda pair: share(*pair)))


def difference(name: str, ours: torch.Tensor, other: torch.Tensor) -> bool:
    """Print the largest difference over the other's spread; 1e-4 of it is what is allowed."""
    found = share(ours, other)
    print(f"{name}: {found:.1e} of the spread, {'well' if found < 1e-4 else 'TOO LARGE'}")
    return found < 1e-4


def share(ours: torch.Tensor, other: torch.Tensor) -> float:
    found = float(((ours - other).abs().max() / other.std()).detach())
    return found if found == found else float("inf")


def encoder(size: int = GLOBAL, batch: int = BATCH) -> None:
    ours, monai = swin_pair(decoder=False)
    x = cube(size, batch)
    pair = forward_backward(ours.encode, x), forward_backward(monai.swinViT, x)
    compare(f"swinunetr's encoder, {batch} x {size}^3", *pair)


def swinunetr(size: int = 96) -> None:  # MONAI's decoder takes no less than 64
    ours, monai = swin_pair(decoder=True)
    output = copy.deepcopy(monai.out)
    x = cube(size)
    pair = forward_backward(lambda x: output(ours.decode(x, ours.encode(x))), x)
    compare(f"swinunetr, {size}^3", pair, forward_backward(monai, x))


def resunet(size: int = GLOBAL) -> None:
    try:
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
    except ImportError:
        print("resunet: skipped, dynamic-network-architectures is not installed")
        return
    ours = build_backbone("resunet").to(DEVICE)
    widths, blocks = (32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6)
    norm = nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}
    act = nn.LeakyReLU, {"inplace": True}
    strides = (1, 2, 2, 2, 2, 2)
    other = ResidualEncoderUNet(
        1, 6, widths, nn.Conv3d, 3, strides, blocks, 2, 1, True, *norm, None, None, *act
    ).to(DEVICE)
    output = copy.deepcopy(other.decoder.seg_layers[-1])
    x = cube(size)
    pair = forward_backward(lambda x: output(ours.decode(x, ours.encode(x))), x)
    compare(f"resunet, {size}^3", pair, forward_backward(other, x))


class PlainHead(nn.Module):
    """DINO's projection head, as lightly and the authors write it, with the weights of ours."""

    def __init__(self, ours: DINOHead):
        super().__init__()
        first, second, third = [m for m in copy.deepcopy(ours.mlp) if isinstance(m, nn.Linear)]
        self.layers = nn.Sequential(first, nn.GELU(), second, nn.GELU(), third)
        last = nn.Linear(256, PROTOTYPES, bias=False)
        last.weight.data.copy_(ours.prototypes.direction.data)
        self.last_layer = nn.utils.parametrizations.weight_norm(last)
        self.last_layer.parametrizations.weight.original0.data.fill_(1)
        self.last_layer.parametrizations.weight.original0.requires_grad = False

    def forward(self, x):
        return self.last_layer(F.normalize(self.layers(x), dim=-1))


def step_pair(ours: nn.Module, encode: nn.Module, global_crops: list, local_crops: list):
    """Return a step of ours and one of a loop over views with `encode`, of the same weights."""
    torch.manual_seed(0)
    head = DINOHead(ours.feature_channels[-1], PROTOTYPES, batchnorm=False)
    plain = plain_step(encode, PlainHead(head), global_crops, local_crops)
    return our_step(ours, head, global_crops, local_crops), plain


def plain_step(encode: nn.Module, head: nn.Module, global_crops: list, local_crops: list):
    """Return DINO's step as lightly's example takes it: view by view, and the loss pair by pair."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.head = encode, head

        def forward(self, x):
            return self.head(self.encode(x)[-1].mean(dim=(2, 3, 4)))

    student = Network().to(DEVICE)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    center = torch.zeros(PROTOTYPES, device=DEVICE)

    def run():
        with autocast():
            with torch.no_grad():
                teacher_out = [teacher(view).float() for view in global_crops]
            student_out = [student(view).float() for view in global_crops + local_crops]
        loss, pairs = 0, 0
        for i, t in enumerate(teacher_out):
            p = ((t - center) / TEACHER_TEMP).softmax(-1)
            for j, s in enumerate(student_out):
                if i != j:
                    loss = loss - (p * (s / STUDENT_TEMP).log_softmax(-1)).sum(-1).mean()
                    pairs += 1
        optimizer.zero_grad()
        loss = loss / pairs
        loss.backward()
        optimizer.step()
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.data = t.data * MOMENTUM + s.data * (1 - MOMENTUM)
        center.mul_(0.9).add_(torch.cat(teacher_out).mean(0), alpha=0.1)
        return loss

    return run


def our_step(backbone: nn.Module, head: nn.Module, global_crops: list, local_crops: list):
    """Return the same step of the parts that `dino.py` takes it from."""
    views = (-1, len(global_crops[0]))  # (views * B, K) -> (views, B, K)
    student = DINONetwork(backbone, "mean", head).to(DEVICE)
    teacher = copy.deepcopy(student).requires_grad_(False)
    targets = TeacherTargets(PROTOTYPES, "center").to(DEVICE)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    global_crops, local_crops = torch.cat(global_crops), torch.cat(local_crops)

    def run():
        with autocast():
            with torch.no_grad():
                p = targets(teacher(global_crops)["logits"], TEACHER_TEMP)
            logits = student(global_crops, local_crops)["logits"]
        optimizer.zero_grad()
        loss = dino_loss(p.unflatten(0, views), logits.unflatten(0, views), STUDENT_TEMP)
        loss.backward()
        optimizer.step()
        update_teacher(teacher, student, MOMENTUM)
        targets.update_center()
        return loss

    return run


def dino_swinunetr() -> None:
    ours, monai = swin_pair(decoder=False)
    views = [cube(GLOBAL) for _ in range(2)], [cube(LOCAL) for _ in range(8)]
    name = f"DINO, swinunetr, {BATCH} x (2 x {GLOBAL}^3 + 8 x {LOCAL}^3)"
    compare(name, *step_pair(ours, monai.swinViT, *views))


class Encode(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone.encode(x)


def dino_resunet() -> None:
    ours = build_backbone("resunet", decoder=False)
    views = [cube(GLOBAL) for _ in range(2)], [cube(GLOBAL) for _ in range(4)]
    pair = step_pair(ours, Encode(copy.deepcopy(ours)), *views)
    compare(f"DINO, resunet, {BATCH} x (2 + 4) x {GLOBAL}^3", *pair)


def memory(size: int = 96) -> None:
    """Print the peak of each arm above what it takes to be there, on a CPU by the kernel."""
    for arm in ("ours", "monai"):
        command = [sys.executable, "-m", "tests.benchmarks.speed", f"peak:{arm}:{size}"]
        subprocess.run(command, check=True)


def most_memory() -> int:
    """Return the most that this program held so far, in KiB. (Of getrusage's ru_maxrss a new
    program begins with what its parent held.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def peak(arm: str, size: int) -> None:
    ours, monai = swin_pair(decoder=False)
    network = ours.encode if arm == "ours" else monai.swinViT
    forward_backward(network, cube(32, 1))()  # gradients and caches are there
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(network, cube(size, 1))()
        mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        before = most_memory()
        forward_backward(network, cube(size, 1))()
        mib = (most_memory() - before) / 1024
    print(f"swinunetr's encoder, {size}^3, peak memory of {arm}: {mib:,.0f} MiB")


def sizes() -> None:
    """Plot the time of our forward and backward passes over what a user may change."""
    swin, _ = swin_pair(decoder=False)
    panels = {
        "crop edge (voxels)": {n: forward_backward(swin.encode, cube(n, 1)) for n in (32, 64, 96)},
        "batch of local crops": {
            n: forward_backward(swin.encode, cube(LOCAL, n)) for n in (1, 2, 4, 8)
        },
        "prototypes": {n: head_pass(n) for n in (1024, 4096, 16384, 65536)},
        "feature_size of swinunetr": {
            n: forward_backward(
                build_backbone("swinunetr", decoder=False, feature_size=n).to(DEVICE).encode,
                cube(GLOBAL, 1),
            )
            for n in (12, 24, 48, 96)
        },
        "windows of a sliding window": {
            n: window_passes(swin, cube(LOCAL, 1), n) for n in (1, 4, 16)
        },
    }
    figure = Figure(figsize=(4 * len(panels), 3), layout="tight")
    axes = figure.subplots(1, len(panels))
    for ax, (name, passes) in zip(axes, panels.items(), strict=True):
        seconds = []
        for run in passes.values():
            seconds.append(statistics.median(timed(run, DEVICE)[0] for _ in range(REPEATS + 1)))
        print(
            f"{name}:", ", ".join(f"{n}: {s:.3f} s" for n, s in zip(passes, seconds, strict=True))
        )
        ax.loglog(list(passes), seconds, "o-")
        ax.set(xlabel=name, ylabel="s", xticks=list(passes), xticklabels=list(passes))
        ax.set_yticks(seconds, [f"{s:.2g}" for s in seconds])
        ax.minorticks_off()
    path = Path("results/benchmarks/sizes.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(path)


def window_passes(network: nn.Module, x: torch.Tensor, num_windows: int):
    @torch.no_grad()
    def run():
        with autocast():
            for _ in range(num_windows):
                network.encode(x)

    return run


def head_pass(prototypes: int):
    """Return a pass of the projection head and DINO's loss for 8 cases of 2 + 8 crops."""
    head = DINOHead(768, prototypes, batchnorm=False).to(DEVICE)
    features = torch.randn(80, 768, device=DEVICE)
    target = torch.full((2, 8, prototypes), 1 / prototypes, device=DEVICE)

    def run():
        with autocast():
            logits = head(features).unflatten(0, (10, 8))
        dino_loss(target, logits, STUDENT_TEMP).backward()

    return run


ROWS = {
    "check": check,
    "encoder": encoder,
    "crops": lambda: encoder(LOCAL, 8 * BATCH),
    "swinunetr": swinunetr,
    "dino_swinunetr": dino_swinunetr,
    "dino_resunet": dino_resunet,
    "memory": memory,
    "resunet": resunet,
    "sizes": sizes,
}


def main() -> None:
    global REPEATS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"{', '.join(ROWS)}; all if none is named")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="after one to warm up")
    arguments = parser.parse_args()
    REPEATS = arguments.repeats
    for name in arguments.rows:
        if name not in ROWS and not name.startswith("peak:"):
            parser.error(f"there is no row {name}; choose from {', '.join(ROWS)}")
    for name in arguments.rows or ROWS:
        if name.startswith("peak:"):  # for `memory`
            _, arm, size = name.split(":")
            peak(arm, int(size))
        else:
            ROWS[name]()


if __name__ == "__main__":
    main()
