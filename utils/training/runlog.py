"""What a run writes while it goes: metrics.csv, log.jsonl, log.txt, TensorBoard; main rank only."""

import csv
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from utils.distributed import is_main


class RunLog:
    """Log of one experiment folder. On ranks other than 0 every method does nothing.

    Args:
        folder: <results_dir>/<experiment>.
        step: optimizer steps done; what an interrupted run logged after them is dropped.
        epoch: epochs done, likewise.
        skipped: problems of the cases that were left out, for the report.
    """

    def __init__(self, folder: str | Path, step: int = 0, epoch: int = 0, skipped: Sequence = ()):
        self.folder, self.rows, self.board, self.skipped = Path(folder), [], None, list(skipped)
        if not is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = [
            r for r in read_metrics(self.folder / "metrics.csv") if r["epoch"] <= epoch and step > 0
        ]
        lines = self._lines("log.jsonl")
        kept = [line for line in lines if json.loads(line)["step"] < step]
        temporary = self.folder / ".log.jsonl.tmp"
        temporary.write_text("".join(kept))
        temporary.replace(self.folder / "log.jsonl")
        self._write_metrics()
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=step)

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name  # the last line may be cut short by a power failure
        return (
            [x for x in path.read_text().splitlines(True) if x.endswith("}\n")]
            if path.exists()
            else []
        )

    def message(self, text: str) -> None:
        """A line on the terminal and in log.txt, with the time."""
        if self.board is not None:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
            print(line, flush=True)
            with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def step(self, step: int, values: dict[str, float]) -> None:
        if self.board is None:
            return
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(
                json.dumps({"step": step, **{k: _finite(v) for k, v in values.items()}}) + "\n"
            )
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
        """(H, W, 3) uint8."""
        if self.board is not None:
            self.board.add_image(name, rgb, step, dataformats="HWC")

    def _write_metrics(self) -> None:
        if not self.rows:
            return
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        temporary = self.folder / ".metrics.csv.tmp"
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
        temporary.replace(self.folder / "metrics.csv")

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_metrics(path: str | Path) -> list[dict[str, float | None]]:
    """Rows of metrics.csv; an empty cell is None."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return [
            {
                k: (int(v) if k in ("epoch", "step") else float(v)) if v else None
                for k, v in row.items()
            }
            for row in csv.DictReader(file)
        ]


def _finite(value: float) -> float | None:
    """JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None
