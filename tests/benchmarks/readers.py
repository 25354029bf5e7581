"""Time of reading a DICOM series: read_volume against MONAI's PydicomReader, and dcm2niix.

    python -m tests.benchmarks.readers [number of slices] [repetitions]

300 uncompressed slices of 512 x 512 int16 with a header of common length, from a warm disk, in a
single process; the readers take turns. Prints the medians and their ratios. dcm2niix takes part
where it is installed (pip install dcm2niix, into an environment of your own): a program, which has
to write the file (uncompressed) that we need not.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from monai.data import PydicomReader
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from data.readers import read_volume
from tests.data.dicom.factory import make_series, save


def write_series(folder: Path, num_slices: int) -> None:
    """A series whose headers have some 90 elements, as those of scanners do."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 50, 512 * 512 * 2, np.uint16)
    size = dict(rows=512, columns=512, spacing=(0.05, 0.05), gap=0.05)
    for number, ds in enumerate(make_series(num_slices, **size, intercept=-1024.0)):
        for k in range(40):
            ds.private_block(0x0019, "PHANTOM", create=True).add_new(k, "LO", f"protocol {k}")
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "T-D4000", "SRT", "Abdomen"
        ds.AnatomicRegionSequence = Sequence([code])
        for keyword in ("StudyDescription", "SeriesDescription", "ProtocolName", "Manufacturer"):
            setattr(ds, keyword, "phantom")
        for keyword in ("KVP", "XRayTubeCurrent", "Exposure", "TableHeight", "WindowCenter"):
            setattr(ds, keyword, "100")
        start = rng.integers(noise.size // 2)
        pixels = np.frombuffer(ds.PixelData, np.uint16) + noise[start : start + 512 * 512]
        ds.PixelData = pixels.tobytes()
        save(ds, folder / f"{number:04d}.dcm")


def read_with_monai(folder: Path) -> np.ndarray:
    reader = PydicomReader()
    return reader.get_data(reader.read(str(folder)))[0]


def convert(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as out:
        command = ["dcm2niix", "-z", "n", "-b", "n", "-o", out, str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main(num_slices: int = 300, repetitions: int = 7) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_series(Path(folder), num_slices)
        ours, theirs = read_volume(folder).voxels, read_with_monai(Path(folder))  # also warms up
        assert np.array_equal(ours, theirs)
        del ours, theirs
        times = {read_volume: [], read_with_monai: []}
        if shutil.which("dcm2niix"):
            times[convert] = []
        for _ in range(repetitions):
            for read, taken in times.items():
                start = time.perf_counter()
                read(Path(folder))
                taken.append(time.perf_counter() - start)
    ours, *others = (1000 * median(taken) for taken in times.values())
    print(f"{num_slices} slices, median of {repetitions}: read_volume {ours:.0f} ms", end="")
    for name, theirs in zip(("PydicomReader", "dcm2niix"), others, strict=False):
        print(f"; {name} {theirs:.0f} ms, {theirs / ours:.1f} times as long", end="")
    print()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
