"""What is saved: tensors and JSON, nothing that could execute, and never half a file."""

import hashlib
import json
import os
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import InputError
from ..schedule import CosineSchedule, DiscreteSchedule
from ..unet import UNet

FORMAT = "mcm-1"
SCHEDULES = {"cosine": CosineSchedule, "discrete": DiscreteSchedule}


def partial_of(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(path.name + ".partial")


def write(path: Path, text: str) -> None:
    """Write a text file, all or nothing."""
    partial_of(path).write_text(text, encoding="utf-8")
    os.replace(partial_of(path), path)


def write_safetensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict, previous: Path | None = None
) -> None:
    """Write tensors and JSON-able metadata, all or nothing; what was there is kept as `previous`.

    Raises InputError if they cannot be written, for want of room or of rights.
    """
    path = Path(path)
    partial = partial_of(path)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        save_file(tensors, partial, {"format": FORMAT, "mcm": json.dumps(metadata)})
        if previous and path.is_file():
            os.replace(path, previous)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"{path} could not be written ({error}): make room, and continue with --resume"
        ) from None


def read_header(path: str | Path) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """-> metadata, shapes of the tensors by name, of a file of ours.

    Raises InputError for a file that is missing, damaged, a pickle or not ours.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint, as a file")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise InputError(
                    f"{path}: a safetensors file, but not a checkpoint written by mcm.save"
                )
            metadata = json.loads(header["mcm"])
            if not isinstance(metadata, dict):
                raise ValueError(f"its header is {type(metadata).__name__}")
            return metadata, {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}
    except InputError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not a readable checkpoint ({error}): truncated, or another format. Use a "
            "file written by mcm.save; pickles (.pt, .ckpt) are not loaded, as they can run code"
        ) from None


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """-> tensors, metadata of a file of ours. Raises InputError as `read_header` does."""
    metadata, _ = read_header(path)
    return load_file(path), metadata


def save(path: str | Path, denoiser: Denoiser, **metadata) -> None:
    """Save a Denoiser around a UNet; `load` needs nothing else.

    Weights as safetensors; network arguments, schedule, prediction, student_steps and any further
    JSON-able `metadata` in the header. Raises InputError for another network.
    """
    if not isinstance(denoiser.network, UNet):
        kind = type(denoiser.network).__name__
        raise InputError(f"mcm.save knows mcm.UNet only: of a {kind} torch.save the state_dict()")
    schedule = denoiser.schedule
    if isinstance(schedule, CosineSchedule):
        arguments = {"kind": "cosine", **vars(schedule)}
    else:
        arguments = {"kind": "discrete", "alphas_cumprod": schedule.alphas_cumprod.tolist()}
    metadata |= {
        "network": denoiser.network.arguments,
        "schedule": arguments,
        "prediction": denoiser.prediction,
        "student_steps": denoiser.student_steps,
    }
    write_safetensors(path, denoiser.network.state_dict(), metadata)


WEIGHTS = Path(__file__).resolve().parents[2] / "tutorials" / "weights"
PRETRAINED = "pretrained:"


def pretrained(name: str) -> Path:
    """ "digits-4" -> the 4-step student of digits that the repository holds; "digits-teacher".

    Raises InputError, naming what there is.
    """
    files = [*WEIGHTS.glob("*/teacher.safetensors"), *WEIGHTS.glob("*/cd-*.safetensors")]
    there = {f"{file.parent.name}-{file.stem.removeprefix('cd-')}": file for file in sorted(files)}
    if name not in there:
        these = ", ".join(there) or "none, as they are in the repository, not in the package"
        raise InputError(f"{PRETRAINED}{name} is not there; these are: {these}")
    return there[name]


def load(path: str | Path, device: str | torch.device = "cpu") -> Denoiser:
    """-> the Denoiser that `save` wrote, in eval mode, with the header in `denoiser.metadata`.

    path: a file, or "pretrained:NAME" for one of those in the repository, see `pretrained`.
    Raises InputError if the file is missing, truncated, a pickle, not ours, or does not fit the
    network that its header describes, which is looked at before memory is taken.
    """
    if str(path).startswith(PRETRAINED):
        path = pretrained(str(path).removeprefix(PRETRAINED))
    metadata, shapes = read_header(path)
    if "network" not in metadata:
        raise InputError(
            f"{path}: a file of ours, but a training state or feature classifier, not a model"
        )
    try:
        check_size(metadata, shapes)
        arguments = dict(metadata["schedule"])
        schedule = SCHEDULES[arguments.pop("kind")](**arguments)
        schedule(torch.tensor([0.0]))  # it can be computed
        network = UNet(**metadata["network"])
        network.load_state_dict(load_file(path))
        denoiser = Denoiser(network, schedule, metadata["prediction"], metadata["student_steps"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: its weights do not fit the network that its header describes ({reason})"
        ) from None
    denoiser.metadata = metadata
    return denoiser.to(device).eval().requires_grad_(False)


def check_size(metadata: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare the tensors of a file with those of the network that its header describes.

    The network is made without memory. Raises ValueError, or what a missing entry raises.
    """
    network = metadata["network"]
    steps = metadata["student_steps"]
    levels, blocks = len(network["multipliers"]), network["blocks"]
    if levels * blocks > len(shapes):
        raise ValueError(f"{blocks} blocks in each of {levels} levels")
    if not 0 < network["image_size"] <= 4096 or steps is not None and not 0 < steps <= 100_000:
        raise ValueError(f"image size {network['image_size']}, student steps {steps}")
    with torch.device("meta"):
        described = {k: tuple(v.shape) for k, v in UNet(**network).state_dict().items()}
    for name in sorted(described.keys() | shapes.keys()):
        if described.get(name) != shapes.get(name):
            raise ValueError(f"{name} would be {described.get(name)}, but is {shapes.get(name)}")


def digest(path: Path) -> str:
    """12 hex digits that tell one file from another."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**24):
            total.update(part)
    return total.hexdigest()[:12]


def make_folder(folder: Path, option: str) -> None:
    """Raises InputError, naming the option, if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise InputError(
            f"{option} {folder} cannot be written to ({error.strerror}): choose another folder"
        ) from None


HELD: list[FileLock] = []
"""On the folders that runs of this process write to."""


def open_out(out: Path, config: dict, resume: bool) -> None:
    """Make the folder of a run, or refuse it; run.json marks it as ours and says what it is for.

    config: what must stay as it was when the run is resumed. (Of a run that ended before it left
        anything, as it was told something wrong, nothing needs to.)
    No other run can open it before `close_out`, or before this process ends, however it does.
    Raises InputError if the folder cannot be written to, is in use, or holds another run.
    """
    marker = out / "run.json"
    make_folder(out, "--out")
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
        HELD.append(lock)
    except Timeout:
        raise InputError(
            f"another run is writing to {out} right now: wait for it, or choose another --out"
        ) from None
    if {path.name for path in out.iterdir()} <= {marker.name, ".lock"}:
        marker.unlink(missing_ok=True)
    if (marker.exists() or (out / "results.json").exists()) and not resume:
        raise InputError(
            f"{out} holds another run's results: continue it with --resume, or choose another --out"
        )
    must_be(out, **config)


def close_out() -> None:
    """Let other runs have the folders that this process has opened."""
    while HELD:
        HELD.pop().release()


def must_be(out: Path, **values) -> None:
    """Note in run.json what a run was begun with; raises InputError where it was something else."""
    marker = out / "run.json"
    before = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else {}
    values = json.loads(json.dumps(values))  # as they are read: with lists for tuples
    differ = [k for k in values if k in before and before[k] != values[k]]
    if differ:
        old, new = (", ".join(f"{k} {a[k]}" for k in differ) for a in (before, values))
        reason = f"{out} holds a run with {old}, but now it is {new}"
        raise InputError(f"{reason}: give the old values, or choose another --out")
    write(marker, json.dumps(before | values))
