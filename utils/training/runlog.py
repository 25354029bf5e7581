"""What a run writes as it goes: metrics.csv, log.jsonl, log.txt and TensorBoard files."""

import csv
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from utils.distributed import is_main
from utils.files import replacing


class RunLog:
    """The log of one experiment folder. On ranks other than 0 every method does nothing.

    Args:
        folder: <results_dir>/<experiment>.
        step, epoch: optimizer steps and epochs done; what was logged after these is dropped.
        skipped: problems of the cases that were left out and notices of others, for the report.
    """

    def __init__(self, folder: str | Path, step: int = 0, epoch: int = 0, skipped: Sequence = ()):
        self.folder, self.rows, self.board, self.skipped = Path(folder), [], None, list(skipped)
        if not is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(self.folder / "metrics.csv")
        self.rows = [row for row in rows if row["epoch"] <= epoch and step > 0]
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines(True) if path.exists() else []
        lines = [line for line in lines if line.endswith("}\n")]  # a crash may cut the last one
        with replacing(path) as file:
            file.writelines(line for line in lines if json.loads(line)["step"] < step)
        self._write_metrics()
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=step)

    def message(self, text: str) -> None:
        """Write a line with the time to the terminal and to log.txt."""
        if self.board is not None:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
            print(line, flush=True)
            with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def step(self, step: int, values: dict[str, float]) -> None:
        if self.board is None:
            return
        # JSON has no NaN or infinity
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"step/{name}", value, step)

    def epoch(self, row: dict[str, float | None], step: int) -> None:
        if self.board is None:
            return
        self.rows.append(row)
        self._write_metrics()
        for name, value in row.items():
            if value is not None and name not in ("epoch", "step"):
                self.board.add_scalar(f"epoch/{name}", value, step)
        self.board.flush()

    def image(self, name: str, rgb, step: int) -> None:
        """Show a picture (H, W, 3) uint8 in TensorBoard."""
        if self.board is not None:
            self.board.add_image(name, rgb, step, dataformats="HWC")

    def _write_metrics(self) -> None:
        if not self.rows:
            return
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with replacing(self.folder / "metrics.csv", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_metrics(path: str | Path) -> list[dict[str, float | None]]:
    """Return the rows of metrics.csv. An empty cell is None."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: _number(k, v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(name: str, text: str) -> float | None:
    if not text:
        return None
    return int(text) if name in ("epoch", "step") else float(text)
