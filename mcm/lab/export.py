"""A student as one ONNX file: noise and classes in, images out, all K steps inside.

    python -m mcm.lab.export runs/digits/cd-4.safetensors digits-4.onnx

Inputs: noise (batch, C, S, S), standard normal, float32; class (batch,), int64, if the model has
classes. Output: image (batch, C, S, S), about -1 to 1. Needs the packages onnx and onnxscript.
"""

import argparse
import copy
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import InputError
from ..sampling import sample
from .checkpoint import load, make_folder


class Sampler(nn.Module):
    """forward(noise, classes): mcm.sample, as a network."""

    def __init__(self, denoiser: Denoiser, steps: int | None):
        super().__init__()
        self.denoiser = denoiser
        self.steps = steps

    def forward(self, noise: Tensor, classes: Tensor | None = None) -> Tensor:
        return sample(self.denoiser, noise, self.steps, classes)


def export(denoiser: Denoiser, path: str | Path, steps: int | None = None) -> None:
    """Write the sampler of a Denoiser around a UNet; steps: as in mcm.sample.

    Raises InputError without the two packages, for steps that mcm.sample refuses, if the path is a
    folder, or if PyTorch's exporter fails, as 2.6's does.
    """
    missing = [name for name in ("onnx", "onnxscript") if not find_spec(name)]
    if missing:
        raise InputError(f"ONNX needs more packages: pip install {' '.join(missing)}")
    if Path(path).is_dir():
        raise InputError(
            f"{path} is a folder: give a file in it, like {Path(path) / 'student.onnx'}"
        )
    make_folder(Path(path).parent, "the folder")
    about = denoiser.network.arguments
    size = about["image_size"]
    inputs = {"noise": torch.randn(2, about["in_channels"], size, size)}
    if about["classes"]:
        inputs["class"] = torch.tensor([0, 1])
    sampler = Sampler(copy.deepcopy(denoiser).cpu().eval(), steps)
    sampler(*inputs.values())  # what is wrong with the steps, it says now
    batch = torch.export.Dim("batch", max=2**20)  # PyTorch 2.6 wants an end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        try:
            torch.onnx.export(
                sampler,
                tuple(inputs.values()),
                str(path),
                input_names=list(inputs),
                output_names=["image"],
                dynamic_shapes=({0: batch},) * len(inputs),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # whatever an exporter stumbles over
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"PyTorch {torch.__version__} could not export it ({reason}): a newer one may"
            ) from error


def main(argv: list[str] | None = None) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("model", help="a file of mcm.save, or pretrained:NAME")
    parser.add_argument("onnx", type=Path, help="where to write")
    parser.add_argument("--steps", type=int, help="default: those the student was made for")
    args = parser.parse_args(argv)
    try:
        export(load(args.model), args.onnx, args.steps)
    except InputError as error:
        print(f"export: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.onnx}: {args.onnx.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
