"""One run on several processes, started by torchrun: torch's DistributedDataParallel, one process per GPU. Alone, all of this does nothing.

Every process draws the random numbers of the whole batch and keeps its own rows, so what a seed means does not depend on how many
processes there are (but for dropout), and a run that several began can be ended by one.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError


def place() -> tuple[int, int]:
    """-> the number of this process, how many there are."""
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


def first() -> bool:
    """Whether this is the process that writes files and talks."""
    return place()[0] == 0


def start(device: str | None) -> str | None:
    """Join the other processes, if torchrun started this one; -> the device for this process. All but the first fall silent.
    Raises InputError where there are more processes than GPUs."""
    if "LOCAL_RANK" not in os.environ:
        return device
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        if (asked := int(os.environ["LOCAL_WORLD_SIZE"])) > (found := torch.cuda.device_count()):
            raise InputError(
                f"{asked} processes on a machine with {found} GPUs: use --nproc_per_node {found}, or --device cpu"
            )
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2))
    if not first():
        sys.stdout, begin = open(os.devnull, "w"), tqdm.__init__
        tqdm.__init__ = lambda bar, *arguments, **options: begin(
            bar, *arguments, **options | {"disable": True}
        )
    return device


def stop() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    """Until all processes are here."""
    if place()[1] > 1:
        dist.barrier()


def in_turn(make: Callable):
    """make() in the first process, and when it is done in the others, which then find its files."""
    if first():
        made = make()
    wait()
    return made if first() else make()


def own(x: Tensor) -> Tensor:
    """The rows of x, (n, ...), that are this process's."""
    rank, processes = place()
    return x.tensor_split(processes)[rank]


def draw(random: Callable[[int], Tensor], n: int) -> Tensor:
    """random(n), or of random(n * processes), which all of them draw alike, the n rows of this one."""
    return own(random(n * place()[1]))


def gathered(x: Tensor) -> Tensor:
    """All processes' rows, in their order; each has those that `own` gives."""
    processes = place()[1]
    if processes == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(processes)]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    most = max(int(n) for n in sizes)
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in range(processes)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes)])


def own_randomness(network: Callable, device: torch.device) -> Callable:
    """The same network, with dropout of this process's own. Its seed comes from the random state, alike in all processes, which is left as it was: two
    calls from one state share their mask, as `consistency_loss` wants it."""

    def call(*arguments):
        with torch.random.fork_rng(
            [] if device.type == "cpu" else [device], device_type=device.type
        ):
            torch.manual_seed(int(torch.randint(2**31, (1,))) + place()[0])
            return network(*arguments)

    return call


def any_process(flag: bool, device: torch.device) -> bool:
    if place()[1] == 1:
        return flag
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total)
    return bool(total)


def check_batch(batch: int, accumulate: int) -> None:
    processes = place()[1]
    if processes > 1 and batch % (processes * accumulate):
        raise InputError(
            f"a batch of {batch} cannot be shared evenly by {processes} processes in {accumulate} parts: use a multiple of {processes * accumulate}"
        )
