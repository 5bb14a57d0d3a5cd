"""A run in TensorBoard, beside the log, which stays the record."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InputError


def check_board(wanted: bool) -> None:
    """Raises InputError if it is wanted and the package is missing."""
    if wanted and not find_spec("tensorboard"):
        raise InputError("--tensorboard needs another package: pip install tensorboard")


class Board:
    """A model's figures and pictures, in a folder for `tensorboard --logdir`.

    first: the first step that is to come; what an interrupted run wrote from there on is hidden.
    """

    def __init__(self, folder: Path, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first)

    def write(self, line: dict) -> None:
        """Every number of a line of the log; of a list, its parts."""
        for key, value in line.items():
            several = isinstance(value, list)
            parts = {f"{key}/{i}": v for i, v in enumerate(value)} if several else {key: value}
            for tag, number in parts.items():
                if isinstance(number, (int, float)) and tag != "step":
                    self.writer.add_scalar(tag, number, line["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()

    def show(self, tag: str, picture: Path, step: int) -> None:
        """A picture file."""
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        self.writer.add_image(tag, pixels, step, dataformats="HWC")
        self.writer.flush()
