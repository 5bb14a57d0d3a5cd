import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # read when torch is loaded, here and in what tests start: on small networks two workers of one thread do more than one of two

import pytest
import torch

import mcm


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def network():
    """A small UNet whose zero-initialised layers are filled in: an untrained one would predict 0 whatever it is asked."""
    net = mcm.UNet(8, 1, 16, (1, 2), 1, attention=(4,), classes=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.ndim == 1 else torch.nn.init.xavier_normal_(p)
    return net
