"""Rows of a table: samples drawn, measured once, kept, and taken over when a run is resumed."""

import json
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..denoiser import select
from ..sampling import sample
from . import distributed, plots
from .checkpoint import digest, write


def on_device(cond: Any, device: torch.device) -> Any:
    """Conditions (a tensor, a named tuple of tensors, or None), on the device."""
    if isinstance(cond, tuple):
        return type(cond)(*(on_device(part, device) for part in cond))
    return None if cond is None else cond.to(device)


def generate(
    model: nn.Module,
    z: Tensor,
    cond: Any,
    device: torch.device,
    chunk: int,
    precision: str = "fp32",
    label: str = "",
    **options,
) -> Tensor:
    """mcm.sample(model, z, cond=cond, **options), in chunks on the device -> on the CPU, like z.

    Several processes share the work, and all of them have the result. label: of a progress bar.
    """
    z = distributed.shard(z)
    if distributed.world_size() > 1:
        cond = distributed.shard(cond)
    parts = []
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with tqdm(total=len(z), desc=label, unit="img", leave=False, disable=not label) as bar, bf16:
        for start in range(0, len(z), chunk):
            index = slice(start, start + chunk)
            here = on_device(select(cond, index), device)
            parts.append(sample(model, z[index].to(device), cond=here, **options))
            bar.update(len(parts[-1]))
    return distributed.gathered(torch.cat(parts)).cpu()


class Rows:
    """The rows of a run's table, kept in out/rows.json as they are made.

    about: what all of them depend on. With resume, rows that were made with the same are taken
    over, and those of them that still hold: whose weights are in the same file as then.
    """

    def __init__(self, out: Path, about: dict, resume: bool):
        self.out = out
        self.file = out / "rows.json"
        self.about = about
        self.entries: dict[str, dict] = {}
        self.seconds = 0.0
        """Spent on measuring, in all parts of the run."""
        if resume and self.file.is_file():
            saved = json.loads(self.file.read_text(encoding="utf-8"))
            if saved.get("about") == about:
                self.entries = saved["rows"]
                self.seconds = saved["seconds"]

    def holds(self, key: str) -> bool:
        """Whether this row is there, made with the weights as they are now."""
        entry = self.entries.get(key)
        return entry is not None and entry["digest"] == self._digest(entry["weights"])

    def add(self, key: str, weights: Path | None, row: dict, seconds: float) -> None:
        """Keep a row. weights: the file in `out` that it was measured with; None: the teacher's."""
        name = None if weights is None else weights.relative_to(self.out).as_posix()
        numbers = {k: v for k, v in row.items() if isinstance(v, float)}
        row = row | {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self.entries[key] = {"weights": name, "digest": self._digest(name), "row": row}
        self.seconds += seconds
        saved = {"about": self.about, "rows": self.entries, "seconds": self.seconds}
        write(self.file, json.dumps(saved))

    def all(self) -> list[dict]:
        return [entry["row"] for key, entry in self.entries.items() if self.holds(key)]

    def _digest(self, name: str | None) -> str | None:
        if name is None:
            return "teacher"
        path = self.out / name
        return digest_at(path, path.stat().st_mtime_ns) if path.is_file() else None


@lru_cache
def digest_at(path: Path, changed: int) -> str:
    """The digest of a file that was written then, computed once: a UNet has gigabytes."""
    return digest(path)


FIGURES = {
    "frechet": ("Fréchet", 3),
    "kernel_distance": ("kernel distance", 4),
    "coverage": ("coverage", 3),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "alignment": ("alignment", 3),
    "reward": ("reward", 2),
    "rmse_to_teacher": ("RMSE to teacher", 3),
    "class_accuracy": ("class accuracy", 3),
    "seconds_per_image": ("s/image", 5),
}
"""The columns that a table can have: a figure's key -> its title, and how many digits."""


def row_line(row: dict, figures: Iterable[str] = FIGURES) -> str:
    """A row, as a line of a table in markdown."""
    cells = [row.get("recipe") or row["model"], row["sampler"], str(row["steps"]), str(row["nfe"])]
    for key in figures:
        cells.append("" if row.get(key) is None else f"{row[key]:.{FIGURES[key][1]}f}")
    return f"| {' | '.join(cells)} |"


def table(results: dict, head: list[str]) -> str:
    """results.md, and what is printed: lines, the table, a line about the seconds."""
    figures = [f for f in FIGURES if any(row.get(f) is not None for row in results["rows"])]
    titles = ["model", "sampler", "steps", "NFE", *(FIGURES[f][0] for f in figures)]
    if results["metric"]["name"] == "fid":
        names = {"Fréchet": "FID", "kernel distance": "KID"}
        titles = [names.get(title, title) for title in titles]
    lines = [*head, "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [row_line(row, figures) for row in results["rows"]]
    seconds = results["seconds"]
    named = {f"K = {k}" if k.isdigit() else k: v for k, v in seconds["students"].items()}
    students = ", ".join(f"{name} {s:.0f}" for name, s in named.items())
    where = f"{results['hardware']}; processes: {results['processes']}"
    whole = f"evaluation {seconds['evaluation']:.0f}, total {seconds['total']:.0f} ({where})"
    teacher = f"teacher {seconds['teacher'] or 0:.0f}"
    return "\n".join([*lines, "", f"Seconds: {teacher}, students {students}, {whole}.", ""])


def report(out: Path, results: dict, head: list[str]) -> None:
    """Write results.json, results.md and the curves of a run, and print the table."""
    text = table(results, head)
    write(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write(out / "results.md", text)
    if results["metric"]["n_reference"]:
        plots.quality_vs_steps(results, out / "quality_vs_steps.png")
    if (out / "log.jsonl").is_file():
        plots.training_curves(out / "log.jsonl", out / "training.png")
    print("\n" + text)
