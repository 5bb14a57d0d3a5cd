"""What the two scripts share: devices, files written whole, a folder that belongs to one run, errors as exit codes."""

import errno
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import InputError


def pick_device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    available = (
        ["cpu"]
        + ["cuda"] * torch.cuda.is_available()
        + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    )
    if name not in available:
        raise InputError(
            f"--device {name} was asked for, but this machine with this build of PyTorch has only {', '.join(available)}: use --device cpu"
        )
    return torch.device(name)


def pick_precision(name: str | None, device: torch.device) -> str:
    """bf16 where a GPU computes in it, if nothing else is asked for."""
    return name or (
        "bf16"
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        else "fp32"
    )


def describe(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


def digest(path: Path) -> str:
    """12 hex digits that tell one checkpoint from another."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**24):
            total.update(part)
    return total.hexdigest()[:12]


def write(path: Path, text: str) -> None:
    """All or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def open_out(out: Path, mine: dict, resume: bool) -> None:
    """Make the folder of a run, or refuse it. run.json marks it as ours and says what it is for (`mine`, as JSON would give it back)."""
    marker = out / "run.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise InputError(
            f"--out {out} cannot be written to ({error.strerror}): choose another folder"
        ) from None
    if (marker.exists() or (out / "results.json").exists()) and not resume:
        raise InputError(
            f"{out} holds another run's results: go on with it by --resume, or choose another --out"
        )
    if marker.exists():
        theirs = json.loads(marker.read_text())
        differ = [k for k in mine if theirs.get(k) != mine[k]]
        if differ:
            old, new = (", ".join(f"{k} {a.get(k)}" for k in differ) for a in (theirs, mine))
            raise InputError(
                f"{out} holds a run with {old}, but now it is {new}: give the old values, or choose another --out"
            )
    write(marker, json.dumps(mine))


def recorded(script: str, argv: list[str]) -> str:
    """The command, of every path only the last component."""
    parts = [part.split("=", 1) for part in argv]
    return shlex.join(
        [
            "python",
            script,
            *("=".join(Path(p).name if os.sep in p else p for p in part) for part in parts),
        ]
    )


def run(script: str, main: Callable[[list[str]], None], argv: list[str]) -> int:
    """-> the exit code: 2 for input that cannot work, with one paragraph that says why."""
    try:
        main(argv)
    except InputError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(
            error, (MemoryError, torch.OutOfMemoryError)
        ) and "can't allocate memory" not in str(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "the system refused more"
        print(
            f"{script}: error: not enough memory ({reason}). Put the batch through the network in more parts: --accumulate 2, 4, ..., "
            "also with --resume, as what was saved before is intact. Where that does not help, begin anew with a smaller network, image or batch.",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(
            f"{script}: error: {error}. What was saved before is intact: make room, and go on with --resume.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nstopped; go on with --resume", file=sys.stderr)
        return 130
    return 0
