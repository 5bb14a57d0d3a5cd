"""A script's configuration and command line, made from one dataclass; devices; exit codes.

A configuration is a frozen dataclass with a docstring under each field. A comment line in its body
begins a group of options:

    @dataclass(frozen=True)
    class Config:
        # preset values
        batch: int = 128
        "Images per training step."
"""

import argparse
import ast
import dataclasses
import errno
import inspect
import os
import platform
import shlex
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import torch

from ..errors import InputError
from . import distributed
from .checkpoint import close_out

PRESET_VALUES = "preset values"
"""The group of fields whose values come from a preset: help does not tell their defaults."""


def documented(config: type) -> dict[str, tuple[str, str]]:
    """-> of each field: the group that it is in, and its docstring."""
    source = textwrap.dedent(inspect.getsource(config))
    lines = source.splitlines()
    found = {}
    body: list = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    for field, text in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            above = [line[6:] for line in lines[: field.lineno] if line.startswith("    # ")]
            docstring = inspect.cleandoc(ast.literal_eval(text.value))
            found[field.target.id] = (above[-1] if above else "", docstring)
    return found


def fields_of(config: type, group: str) -> list[str]:
    """The names of the fields in a group."""
    return [name for name, (of, _) in documented(config).items() if of == group]


def parser(config: type, prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with an option for each field. What is not given is not in its answer."""
    texts: dict = {"prog": prog, "description": description, "epilog": epilog}
    layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=100)
    made = argparse.ArgumentParser(
        **texts, formatter_class=layout, argument_default=argparse.SUPPRESS
    )
    types = get_type_hints(config)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    groups = {}
    for name, (group, text) in documented(config).items():
        if group not in groups:
            groups[group] = made.add_argument_group(group)
        default = defaults[name]
        told = "default" in text or default is None or default is False
        if not told and group != PRESET_VALUES:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            text += f" (default: {shown})"
        kind = argument(types[name], default)
        groups[group].add_argument(option(name), help=text.replace("%", "%%"), **kind)
    return made


def argument(kind: type, default: object) -> dict:
    """A type, as arguments of add_argument."""
    if get_origin(kind) in (Union, UnionType):  # with None, or with what only presets have
        kind = next(k for k in get_args(kind) if k is not NoneType and get_origin(k) is not dict)
    if kind is bool:
        yes_or_no = default is not False
        return {"action": argparse.BooleanOptionalAction if yes_or_no else "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        items = get_args(kind)
        nargs = "*" if items[-1] is Ellipsis else len(items)
        return argument(items[0], default) | {"nargs": nargs, "action": AsTuple}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "NAME", Path: "PATH"}[kind]}


class AsTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def values(config: object, *names: str) -> dict:
    """These fields by name."""
    return {name: getattr(config, name) for name in names}


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_positive(config: object, names: tuple[str, ...]) -> None:
    """Raises InputError for one of these fields (a number, or several) that is not positive."""
    for name in names:
        value = getattr(config, name)
        values = list(value.values()) if isinstance(value, dict) else value
        values = values if isinstance(values, (list, tuple)) else [values]
        if any(v is not None and v <= 0 for v in values):
            shown = " ".join(map(str, values))
            raise InputError(f"{option(name)} must be positive, not {shown}")


def check_range(config: object, **ranges: tuple[float, float]) -> None:
    """Raises InputError for a field that is not in [low, high)."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value < high:
            raise InputError(f"{option(name)} must be at least {low} and below {high}, not {value}")


def pick_device(name: str | None) -> torch.device:
    """The device of this name, or the best there is, with its index, and made the current one.

    Raises InputError if it is not there.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    mps = ["mps"] * torch.backends.mps.is_available()
    available = ["cpu", *mps] + ["cuda"] * torch.cuda.is_available() + gpus
    if name not in available:
        known = ", ".join(available)
        raise InputError(f"no --device {name} on this machine, or for this PyTorch: use {known}")
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # some of CUDA's functions want an index
        torch.cuda.set_device(device)
    return device


def pick_precision(name: str | None, device: torch.device) -> str:
    """bf16 where a GPU computes in it, if nothing else is asked for."""
    if name:
        return name
    gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if gpu else "fp32"


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def provenance(script: str, argv: list[str], device: torch.device, packages: list[str]) -> dict:
    """Where figures come from: hardware, command (of every path only the last part), versions."""
    parts = [part.split("=", 1) for part in argv]
    short = ["=".join(Path(p).name if os.sep in p else p for p in part) for part in parts]
    versions = {name: sys.modules[name].__version__ for name in packages}
    return {
        "device": str(device),
        "hardware": hardware(device),
        "processes": distributed.world_size(),
        "command": shlex.join(["python", script, *short]),
        "versions": versions | {"python": platform.python_version()},
    }


def run(
    script: str,
    main: Callable[[list[str]], None],
    argv: list[str],
    smaller: str = "a smaller network, image or batch",
) -> int:
    """-> the exit code: 2 for input that cannot work, with one paragraph that says why.

    smaller: what needs less memory.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no letter is worth a run whose terminal lacks it
            stream.reconfigure(errors="backslashreplace")
    try:
        main(argv)
        return 0
    except KeyboardInterrupt:
        print("\nstopped; continue with --resume", file=sys.stderr)
        return 130
    except InputError as error:
        reason = str(error)
    except torch._dynamo.exc.TorchDynamoException as error:
        what = str(error).splitlines()[0]
        reason = f"no C++ compiler (CPU) or Triton (GPU)? Leave out --compile ({what})"
    except (MemoryError, RuntimeError) as error:
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not memory and "can't allocate memory" not in str(error):
            raise
        what = str(error).splitlines()[0] if str(error) else "the system refused more"
        reason = (
            f"not enough memory ({what}). Put the batch through the network in more parts: "
            "--accumulate 2, 4, ..., also with --resume, as what was saved before is intact. Where "
            f"that does not help, start again with {smaller}."
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = f"{error}. What was saved before is intact: make room, continue with --resume."
    finally:
        close_out()
    print(f"{script}: error: {reason}", file=sys.stderr)
    return 2
