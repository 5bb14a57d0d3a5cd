"""One run on several processes, started by torchrun: DistributedDataParallel, one process per GPU.

Alone, all of this does nothing. Every process draws the random numbers of the whole batch and keeps
its own rows, so what a seed means does not depend on how many processes there are (but for
dropout), and a run that several began can be ended by one.
"""

import os
import sys
import time
import zlib
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..errors import InputError
from ..losses import restored_randomness


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and talks."""
    return rank() == 0


def start(device: str | None) -> str | None:
    """Join the other processes, if torchrun started this one; -> the device for this process.

    All but the first fall silent. Raises InputError where there are more processes than GPUs.
    """
    if "LOCAL_RANK" not in os.environ:
        return device
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        asked = int(os.environ["LOCAL_WORLD_SIZE"])
        found = torch.cuda.device_count()
        if asked > found:
            raise InputError(f"{asked} processes, {found} GPUs: use --nproc_per_node {found}")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2))
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        tqdm.__init__ = _silent_bar
    return device


_bar = tqdm.__init__


def _silent_bar(self, *arguments, **options) -> None:
    _bar(self, *arguments, **options | {"disable": True})


def stop() -> None:
    if is_distributed():
        # PyTorch 2.6 destroys with the interpreter's lock held, and waits for gloo's threads, which
        # need it to give back the last tensors: for ever, unless they had a moment to do so.
        time.sleep(0.5)
        dist.destroy_process_group()


def barrier() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def main_first(make: Callable):
    """make() in the first process, and when it is done in the others, which then find its files."""
    if is_main():
        made = make()
    barrier()
    return made if is_main() else make()


def shard(x: Tensor) -> Tensor:
    """The rows of x, (n, ...), that are this process's."""
    return x.tensor_split(world_size())[rank()]


def gathered(x: Tensor) -> Tensor:
    """All processes' rows, in their order; each has those that `shard` gives."""
    if world_size() == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    most = max(int(n) for n in sizes)
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes)])


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process; all of them must ask."""
    if world_size() == 1:
        return flag
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total)
    return bool(total)


class Parallel(nn.Module):
    """network, with the gradients averaged over the processes, and dropout of this process's own.

    Its seed comes from the random state of the device, which is alike in all processes and left as
    it was: two calls from one state share their mask, as `consistency_loss` wants it.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        super().__init__()
        self.network = network
        if world_size() > 1:
            self.network = DistributedDataParallel(network, broadcast_buffers=False)
        self.device = device

    def forward(self, *inputs) -> Tensor:
        on_cpu = self.device.type == "cpu"
        state = torch.get_rng_state() if on_cpu else torch.cuda.get_rng_state(self.device)
        with restored_randomness(self.device):
            torch.manual_seed(zlib.crc32(state.numpy().tobytes()) + rank())
            return self.network(*inputs)
