"""What a run writes as it goes: metrics.csv, log.jsonl, log.txt, TensorBoard files, a tracker."""

import csv
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from utils.distributed import is_main
from utils.files import replacing
from utils.training.trackers import Tracker

SHOWN = ("loss", "val_loss", "val_dice", "val_auc", "probe_dense_dice", "teacher_entropy")


class RunLog:
    """The log of one experiment folder. On ranks other than 0 every method does nothing.

    Args:
        folder: <results_dir>/<experiment>.
        step, epoch: optimizer steps and epochs done; what was logged after these is dropped.
        skipped: problems of the cases that were left out and notices of others, for the report.
        num_epochs: of the whole run, to say when it ends; None if that is not known.
        track: opens what `open_tracker` returns, in the folder; called on rank 0.
    """

    def __init__(
        self,
        folder: str | Path,
        step: int = 0,
        epoch: int = 0,
        skipped: Sequence = (),
        num_epochs: int | None = None,
        track: Callable[[], Tracker | None] = lambda: None,
    ):
        self.folder, self.rows, self.board, self.skipped = Path(folder), [], None, list(skipped)
        self.num_epochs, self.first, self.began = num_epochs, epoch, time.time()
        self.last, self.tracker = self.began, None
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
        self.tracker = track()

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
        self._numbers("step", values, step)

    def epoch(self, row: dict[str, float | None], step: int, best_epoch: int = 0) -> None:
        """Write a row of metrics.csv and a line. best_epoch: the best so far, 0 if not known."""
        if self.board is None:
            return
        now = time.time()
        row = {**row, "seconds": round(now - self.last, 1)}
        self.last = now
        self.rows.append(row)
        self._write_metrics()
        self.message(self._told(row, best_epoch, now))
        self._numbers("epoch", {k: v for k, v in row.items() if k not in ("epoch", "step")}, step)
        self.board.flush()

    def _numbers(self, kind: str, values: dict[str, float | None], step: int) -> None:
        """Show numbers in TensorBoard and the tracker, if there is one."""
        known = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
        for name, value in known.items():
            self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.numbers({k: v for k, v in known.items() if math.isfinite(v)}, step)

    def _told(self, row: dict[str, float | None], best_epoch: int, now: float) -> str:
        """Return an epoch in a line: what was reached, how long it took, when the run will end."""
        epoch, total = row["epoch"], self.num_epochs
        values = [f"{name} {row[name]:.4g}" for name in SHOWN if row.get(name) is not None]
        text = f"epoch {epoch}/{total}" if total else f"epoch {epoch}"
        values += [f"best {best_epoch}"] if best_epoch else []
        text = f"{' '.join([text, *values])}, {row['seconds']:.0f} s"
        if total and self.first < epoch < total:
            ends = now + (now - self.began) / (epoch - self.first) * (total - epoch)
            day = "" if ends < now + 12 * 3600 else "%Y-%m-%d "
            text += time.strftime(f", ends {day}%H:%M", time.localtime(ends))
        return text

    def image(self, name: str, rgb, step: int) -> None:
        """Show a picture (H, W, 3) uint8 in TensorBoard and the tracker."""
        if self.board is not None:
            self.board.add_image(name, rgb, step, dataformats="HWC")
        if self.tracker:
            self.tracker.image(name, rgb, step)

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
        if self.tracker:
            self.tracker.close()


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
