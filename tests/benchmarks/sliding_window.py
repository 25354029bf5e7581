"""Sliding window over 128^3 voxels, roi 64^3, overlap 0.5: ours against MONAI's.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.sliding_window

The same network (a residual U-Net, random weights). Both run in one process and by turns, REPEATS
times; medians are shown, in seconds of CPU time where one thread runs, so that other programs
disturb less. Targets: the same answer (argmax differs in less than 1e-5 of the voxels) in
no more time; in 0.7 of it where half the volume is air, as then 19 of the 27 windows are evaluated.

On a CPU ours evaluates windows one by one, whatever the batch: beside other programs activations of
four do not fit into its caches. On a quiet machine that is no gain.
"""

import statistics
import time

import torch
from monai.inferers import sliding_window_inference
from torch import nn

from models.backbones import build_backbone
from utils.sliding_window import sliding_window

SIZE, ROI, OVERLAP, CLASSES, REPEATS = 128, 64, 0.5, 3, 5
BATCHES = (4, 1)


def make_network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    backbone = build_backbone("resunet", features=[16, 32, 64, 128, 128], blocks=[1, 1, 1, 1, 1])
    head = nn.Conv3d(backbone.feature_channels[0], CLASSES, 1)

    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = backbone, head

        def forward(self, x):
            return self.head(self.backbone.decode(x, self.backbone.encode(x))).softmax(1)

    return Segmenter().eval().to(device)


def timed(function, device: torch.device) -> tuple[float, torch.Tensor]:
    # of several threads those that wait for each other take the CPU's time, too
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    begin = clock()
    out = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin, out


def compare(name: str, image: torch.Tensor, network: nn.Module, batch: int) -> None:
    def ours():
        return sliding_window(network, image, [ROI] * 3, OVERLAP, batch)

    def monai():
        with torch.no_grad():
            return sliding_window_inference(
                image[None], [ROI] * 3, batch, network, OVERLAP, mode="gaussian"
            )[0]

    times = {"ours": [], "monai": []}
    for repeat in range(REPEATS + 1):
        ours_time, out = timed(ours, image.device)
        monai_time, expected = timed(monai, image.device)
        if repeat > 0:  # the first warms up
            times["ours"].append(ours_time)
            times["monai"].append(monai_time)
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["monai"], strict=True))
    differ = (out.argmax(0) != expected.argmax(0)).float().mean()
    shown = ", ".join(f"{k} {statistics.median(v):.2f} s" for k, v in times.items())
    print(f"{name}: {shown}, ratio {ratio:.3f}; argmax differs in {differ:.1e} of the voxels")


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = make_network(device)
    image = torch.rand(1, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    half = image.clone()
    half[:, SIZE // 2 :] = 0
    for batch in BATCHES:
        print(f"{SIZE}^3, roi {ROI}^3, overlap {OVERLAP}, batch {batch}, on {device}")
        compare("whole volume", image.to(device), network, batch)
        compare("half of it air", half.to(device), network, batch)


if __name__ == "__main__":
    main()
