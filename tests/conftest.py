import os

# Read when torch is loaded, here and in what tests start: on small networks two workers of one
# thread do more than one of two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import mcm


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def network():
    """A small UNet whose zero-initialised layers are filled in: an untrained one would predict 0
    whatever it is asked.
    """
    net = mcm.UNet(8, 1, 16, (1, 2), 1, attention=(4,), classes=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.ndim == 1 else torch.nn.init.xavier_normal_(p)
    return net


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the slow tests, as CI does")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: only with --all")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
