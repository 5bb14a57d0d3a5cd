"""The three pictures of a run. Colours are the Okabe-Ito set, which colour-blind readers can tell
apart.
"""

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure  # not pyplot, whose backend is the user's
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A"]
WIDEST = 256
"""Dots that an image of a grid is wide: fifty of 1024 would take gigabytes to draw."""

SAMPLERS = {"ddim": "DDIM", "addim": "aDDIM", "renoise": "re-noised"}


def thumbnails(images: Tensor, widest: int = WIDEST) -> Tensor:
    """(n, C, S, S) -> the same on the CPU, with S at most `widest`."""
    if images.shape[-1] <= widest:
        return images.float().cpu()
    how: dict = {"size": (widest, widest), "mode": "bilinear", "antialias": True}
    return torch.cat([interpolate(part.float(), **how).cpu() for part in images.split(1)])


def sample_rows(rows: dict[str, Tensor], path: Path, columns: Sequence[str] = ()) -> None:
    """rows: label -> images (n, C, H, W) in [-1, 1], drawn one row each under a common set of
    columns; columns: their captions.
    """
    images = torch.cat([thumbnails(row) for row in rows.values()])
    n, size = len(next(iter(rows.values()))), images.shape[-1] + 1
    grid = make_grid((images.clamp(-1, 1) + 1) / 2, nrow=n, padding=1, pad_value=1.0)
    pixels = min(4, WIDEST // (size - 1))
    pixels = max(pixels, -(-50 // size))  # at least 50 dots a row, to be seen
    titles = [textwrap.fill(text, max(8, size * pixels // 7)) for text in columns]
    foot = 8 + 13 * max((1 + text.count("\n") for text in titles), default=0)
    width, height = n * size * pixels + 190, len(rows) * size * pixels + 8 + foot
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    axes = figure.add_axes((190 / width, foot / height, 1 - 195 / width, 1 - (8 + foot) / height))
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto")
    axes.set_yticks([size * (i + 0.5) for i in range(len(rows))], list(rows))
    axes.set_xticks(
        [size * (i + 0.5) for i in range(len(titles))], titles, fontsize=7, parse_math=False
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path)


def quality_vs_steps(results: dict, path: Path) -> None:
    """Frechet distance against evaluations per image, a curve for each model and sampler."""
    figure = Figure(figsize=(6.4, 4.2), dpi=120)
    axes = figure.subplots()
    curves: dict[str, list] = {}
    for row in results["rows"]:
        # one curve for the students of one recipe
        name = re.sub(r"-\d+$", "", row.get("recipe", row["model"]))
        label = f"{name}, {SAMPLERS[row['sampler']]}"
        curves.setdefault(label, []).append((row["nfe"], row["frechet"]))
    for (label, points), colour, marker in zip(curves.items(), COLOURS * 2, "sDo^vPX*<>dph"):
        x, y = zip(*sorted(points))
        axes.plot(x, y, marker=marker, color=colour, label=label, linewidth=1.6, markersize=5)
    ticks = sorted({row["nfe"] for row in results["rows"]})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xlabel("network evaluations per image")
    metric = results["metric"]
    name = "FID" if metric["name"] == "fid" else "Fréchet distance"
    axes.set_ylabel(f"{name} (lower is better)")
    real = f"{metric['n_reference']:,} {metric['reference']} images"
    title = f"{metric['n_generated']:,} samples against {real}, features: {metric['features']}"
    axes.set_title(textwrap.fill(title, 85), fontsize=9, parse_math=False)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def training_curves(log: Path, path: Path) -> None:
    """Left: the loss of each model over its run. Right: the loss by noise level t over the last
    quarter of each run.
    """
    runs: dict[str, list[dict]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["loss"] is not None:
            runs.setdefault(entry["model"], []).append(entry)
    figure = Figure(figsize=(10, 4), dpi=120)
    left, right = figure.subplots(1, 2)
    for (name, entries), colour in zip(runs.items(), COLOURS * (1 + len(runs) // len(COLOURS))):
        steps, losses = zip(*((e["step"], e["loss"]) for e in entries))
        left.plot(steps, losses, color=colour, label=name)
        last = [e["loss_by_t"] for e in entries[-max(1, len(entries) // 4) :]]
        means = [[v for v in column if v is not None] for column in zip(*last)]
        points = [((i + 0.5) / len(means), sum(v) / len(v)) for i, v in enumerate(means) if v]
        if points:
            right.plot(*zip(*points), marker="o", color=colour, label=name)
    left.set_xlabel("training step")
    right.set_xlabel("t (0 = clean image, 1 = noise)")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylabel("training loss")
        axes.grid(alpha=0.3, which="both")
    left.set_title("loss over the run (students' targets change with the grid)", fontsize=10)
    right.set_title("loss by noise level, end of the run", fontsize=10)
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
