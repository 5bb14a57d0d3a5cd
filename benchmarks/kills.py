#!/usr/bin/env python3
"""Kill a run at random moments: does what it ends with depend on it? Takes a quarter of an hour.

    python benchmarks/kills.py [KILLS, default 30] [OPTIONS OF run_cifar.py, for another run]

A small digits run (classifier, teacher, two students, evaluation) is made once undisturbed. Then it
is made again KILLS times, each time killed (SIGKILL) at a random moment and resumed, every third
one killed a second time, every fourth one when it next writes a file. Every checkpoint that a run
leaves must be the same bit for bit, and results.json the same but for the times. Exit code 1 if one
is not. POSIX only: runs are forked, so that none imports PyTorch again.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_cifar
from mcm.lab.checkpoint import read_safetensors

RUN = (
    "--data digits --device cpu --channels 16 --teacher-iterations 120 --student-iterations 60 "
    "--steps 1 2 --samples 256 --classifier-iterations 30 --batch 32 --save-every 6"
)
OUTPUTS = ("teacher", "cd-1", "cd-2", "teacher.state", "cd-1.state", "cd-2.state")


def start(out: Path, resume: bool) -> int:
    """-> the process that makes, or goes on with, the run in `out`."""
    pid = os.fork()
    if pid:
        return pid
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    code = 1
    with contextlib.suppress(BaseException):
        code = run_cifar.run(
            [*RUN.split(), *sys.argv[2:], "--out", str(out), *["--resume"] * resume]
        )
    os._exit(code)


def finish(out: Path, resume: bool) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(start(out, resume), 0)[1])
    if code:
        sys.exit(
            f"a run ended with exit code {code}: see it for yourself with python run_cifar.py {RUN}"
        )


def killed(out: Path, resume: bool, seconds: float, writing: bool = False) -> bool:
    """Start, wait (with `writing`: on, until a file is being written), kill; -> whether the run was
    still alive.
    """
    pid = start(out, resume)
    time.sleep(seconds)
    while (
        writing
        and not list(out.glob("*.partial"))
        and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
        pass
    alive = os.waitpid(pid, os.WNOHANG)[0] == 0
    if alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return alive


def where(out: Path) -> str:
    """What a run was at when it was killed."""
    if list(out.glob("*.partial")):
        return "writing " + next(out.glob("*.partial")).name.removesuffix(".partial")
    if (out / "rows.json").exists():
        return "evaluation"
    for name in ("cd-2", "cd-1", "teacher"):
        if (out / f"{name}.state.safetensors").exists():
            done = read_safetensors(out / f"{name}.state.safetensors")[1]["step"]
            return f"{name}, after step {done}"
    return "before the first checkpoint"


def same(a: Path, b: Path) -> bool:
    for name in OUTPUTS:
        first, second = (read_safetensors(out / f"{name}.safetensors")[0] for out in (a, b))
        if first.keys() != second.keys() or not all(
            torch.equal(first[k], second[k]) for k in first
        ):
            return False
    first, second = (
        json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"] for out in (a, b)
    )
    return [{k: v for k, v in row.items() if k != "seconds_per_image"} for row in first] == [
        {k: v for k, v in row.items() if k != "seconds_per_image"} for row in second
    ]


def main(kills: int) -> int:
    torch.set_num_threads(1)
    rng, folder = random.Random(0), Path(tempfile.mkdtemp())
    began = time.perf_counter()
    finish(folder / "whole" / "run", False)
    whole = time.perf_counter() - began
    print(f"undisturbed: {whole:.1f} s", flush=True)
    bad = done = 0
    while done < kills:
        out = folder / "broken" / "run"
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        moment, second = rng.uniform(0, whole), rng.uniform(0, whole / 2)
        if not killed(out, False, moment, writing=done % 4 == 1):
            continue
        done += 1
        at = [f"{moment:.1f} s ({where(out)})"]
        if done % 3 == 0 and done < kills and killed(out, True, second):
            done += 1
            at.append(f"{second:.1f} s after resuming ({where(out)})")
        finish(out, True)
        equal = same(folder / "whole" / "run", out)
        bad += not equal
        print(
            f"kill {done:2}: {', then '.join(at)}: {'identical' if equal else 'DIFFERENT'}",
            flush=True,
        )
    print(f"{done} kills, {bad} runs that ended differently")
    shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 30))
