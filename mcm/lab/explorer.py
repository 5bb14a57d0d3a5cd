"""A run as a page to play with: one file, which opens from the disk in any browser.

A slider for the number of steps; images from the same noise under it; quality against steps; the
way of each image from noise, step by step. page/run.html is the page; its style, handles and keys
(page/style.css, page/figures.js) are also those of tutorials/explorer.html.
"""

import base64
import html
import inspect
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..sampling import sample
from ..solvers import ddim
from .checkpoint import write
from .plots import SAMPLERS, thumbnails

PAGE = Path(__file__).parent / "page"
SHOWN = 8
"""Of a longer path, so many steps are shown."""


@dataclass
class View:
    """What one model draws in so many steps, from the page's noise.

    images, nearest: (n, C, H, W) in [-1, 1]; nearest: the training image nearest to each.
    path: (steps shown, 2, n, C, H, W), z_t and x_hat at each of `times`; None: not shown.
    row: of the table, for its figures.
    """

    model: str
    steps: int
    images: Tensor
    row: dict
    times: list[float] = field(default_factory=list)
    path: Tensor | None = None
    nearest: Tensor | None = None


def walk(
    model: nn.Module, z: Tensor, cond: Any, solver: Callable = ddim, **options
) -> tuple[Tensor, list[float], Tensor]:
    """mcm.sample(model, z, cond=cond, solver=solver, **options), watched.

    -> its images, at most SHOWN of its times from 1 on, and z_t and x_hat there: (shown, 2, ...).
    """
    states, times = [], []

    @wraps(solver)  # a solver's parameters say what it is given
    def watched(x_hat, z_t, t, s, schedule, **more):
        states.append(torch.stack([z_t, x_hat]).cpu())
        times.append(t[0].item())
        return solver(x_hat, z_t, t, s, schedule, **more)

    watched.__signature__ = inspect.signature(solver)  # type: ignore[attr-defined]
    images = sample(model, z, cond=cond, solver=watched, **options).cpu()
    count = min(SHOWN, len(times))
    chosen = [i * len(times) // count for i in range(count)]
    return images, [times[i] for i in chosen], torch.stack([states[i] for i in chosen])


def sheet(images: Tensor, exact: bool) -> str:
    """Rows of images (rows, n, C, H, W) in [-1, 1] as one picture, as the URL of its own data.

    exact: as PNG; else as JPEG, which noise needs less of.
    """
    rows, n, channels, height, width = images.shape
    whole = images.permute(0, 3, 1, 4, 2).reshape(rows * height, n * width, channels)
    dots = ((whole.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, -1, 3)
    stream = io.BytesIO()
    kind, how = ("png", {"optimize": True}) if exact else ("jpeg", {"quality": 80})
    Image.fromarray(dots.contiguous().numpy()).save(stream, kind, **how)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def how_many(size: int) -> int:
    """Images of this size that a page of a few megabytes has room for."""
    return 40 if size <= 16 else 20 if size <= 32 else 10


def as_data(view: View, metric: str) -> dict:
    """What the page is told of a view."""
    row, size = view.row, view.images.shape[-1]
    exact = size <= 32
    told = {"model": view.model, "steps": view.steps, "times": view.times, "nfe": row["nfe"]}
    told |= {"sampler": SAMPLERS[row["sampler"]], "figure": row.get(metric)}
    told["ms"] = 1000 * row["seconds_per_image"]
    told["images"] = sheet(thumbnails(view.images, 128)[None], exact)
    if view.nearest is not None:
        told["nearest"] = sheet(thumbnails(view.nearest, 64)[None], exact)
    if view.path is not None:
        small = thumbnails(view.path.flatten(0, 2), 64)
        path = small.unflatten(0, view.path.shape[:3]).clone()
        path[:, 0] /= 2  # z_t, whose values go beyond an image's
        told["path"] = sheet(path.flatten(0, 1), size <= 16)
    return told


def save_page(
    out: Path,
    views: list[View],
    labels: list[str],
    kind: str,
    title: str,
    note: str,
    metric: tuple[str, str] = ("frechet", "Fréchet distance"),
) -> None:
    """Write the page.

    labels: one for each place, of this kind ("class", "caption"). note: what the measure is.
    metric: its key in the views' rows, and its name.
    """
    columns = max(c for c in range(1, 11) if len(labels) % c == 0)
    data: dict = {"title": title, "note": note, "kind": kind, "metric": metric[1]}
    data |= {"labels": labels, "columns": columns, "smooth": views[0].images.shape[-1] > 64}
    data["views"] = [as_data(view, metric[0]) for view in views]
    safe = json.dumps(data, allow_nan=False).replace("</", "<\\/")  # it stands inside <script>
    text = (PAGE / "run.html").read_text(encoding="utf-8")
    for mark, part in {
        "DATA_TITLE": html.escape(title),
        "SHARED_STYLE": (PAGE / "style.css").read_text(encoding="utf-8"),
        "SHARED_SCRIPT": (PAGE / "figures.js").read_text(encoding="utf-8"),
        "DATA_JSON": safe,
    }.items():
        text = text.replace(mark, part, 1)
    write(out, text)
