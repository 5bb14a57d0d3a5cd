"""Images and labels, in memory as bytes: digits, CIFAR-10, ImageNet 64x64, or any folder of images."""

import hashlib
import json
import math
import os
import pickle
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import center_crop, resize
from tqdm import tqdm

from ..errors import InputError


@dataclass
class ImageData:
    """images: (N, C, H, W) uint8; labels: (N,) int64 in [0, classes). held_*: the same, never trained on."""

    name: str
    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor
    classes: int

    def to(self, device: torch.device) -> "ImageData":
        tensors = (
            a.to(device) for a in (self.images, self.labels, self.held_images, self.held_labels)
        )
        return ImageData(self.name, *tensors, self.classes)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)"""
        return tuple(self.images.shape[1:])

    def fingerprint(self) -> str:
        """12 hex digits that change with the training images or labels (from at most 4,096 of them: enough to tell data sets apart)."""
        rows = torch.linspace(0, len(self.images) - 1, min(len(self.images), 4096)).long()
        sample = b"".join(
            a[rows.to(a.device)].cpu().numpy().tobytes() for a in (self.images, self.labels)
        )
        return hashlib.sha256(f"{self.name} {len(self.images)} ".encode() + sample).hexdigest()[:12]


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def load_data(name: str, data_dir: str | Path = "data", image_size: int | None = None) -> ImageData:
    """name: "digits", "cifar10", "imagenet64" or "folder"; image_size: what a folder's images are resized to, and the others' averaged
    down to (None: 64 for a folder, else as they are).

    Raises InputError, naming the file, for anything missing, truncated or of the wrong shape.
    """
    if name == "digits":
        return averaged(digits(), image_size)
    if name == "cifar10":
        return averaged(cifar10(Path(data_dir)), image_size)
    if name == "imagenet64":
        return averaged(imagenet64(Path(data_dir)), image_size)
    if name == "folder":
        return folder(Path(data_dir), image_size or 64)
    raise InputError(f"unknown data set {name!r}: choose digits, cifar10, imagenet64 or folder")


def averaged(data: ImageData, image_size: int | None) -> ImageData:
    """The same images in fewer pixels, each the mean of a square. Raises InputError if the squares do not come out even."""
    size = data.image_shape[-1]
    if image_size in (None, size):
        return data
    if image_size < 1 or size % image_size:
        raise InputError(
            f"{data.name} has images of {size} pixels, which cannot be averaged down to {image_size}: choose {size}, {size // 2} or {size // 4}"
        )

    def shrunk(images: Tensor) -> Tensor:
        parts = [
            F.avg_pool2d(part.float(), size // image_size).round().byte()
            for part in images.split(10_000)
        ]
        return torch.cat(parts)

    return replace(data, images=shrunk(data.images), held_images=shrunk(data.held_images))


def hold_out(
    name: str, images: Tensor, labels: Tensor, classes: int, n: int | None = None
) -> ImageData:
    """Set n random images aside (default: a tenth, at most 1,000), the same ones in every run whatever its seed."""
    if len(images) < 20:
        raise InputError(
            f"{len(images)} images are too few to train on: at least 20 are needed, and thousands to learn from"
        )
    n = min(1000, len(images) // 10) if n is None else n
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held, kept = order[:n].sort().values, order[n:].sort().values
    return ImageData(name, images[kept], labels[kept], images[held], labels[held], classes)


def digits() -> ImageData:
    """1,797 scanned digits of 8x8 pixels with 17 grey levels, from scikit-learn's package (no download); 297 held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    return hold_out("digits", images, torch.from_numpy(bunch.target).long(), 10, 297)


# --- CIFAR-10 ------------------------------------------------------------------------------------------------------------

CIFAR_ROW = 1 + 3 * 32 * 32  # the binary version: a label byte, then the red, green and blue planes
CIFAR_FILE = 10_000 * CIFAR_ROW


class ArrayUnpickler(pickle.Unpickler):
    """Reads the python version's files, which are pickles, and nothing but plain containers and numpy arrays in them."""

    def find_class(self, module: str, name: str):
        if (
            module.split(".")[0] == "numpy"
            and name in ("_reconstruct", "ndarray", "dtype")
            or (module, name) == ("_codecs", "encode")
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 file needs")


def cifar10(data_dir: Path) -> ImageData:
    """50,000 training images of 10 classes; the test batch, where there is one, is held out, else 1,000 of the training images.

    Looks for data_batch_1 ... 5 (python version) or data_batch_1.bin ... (binary version) in data_dir and its usual sub-folders, and
    downloads the python version through torchvision if there is neither.
    """
    places = (data_dir, data_dir / "cifar-10-batches-py", data_dir / "cifar-10-batches-bin")
    found = [
        (p, end) for p in places for end in ("", ".bin") if (p / f"data_batch_1{end}").is_file()
    ]
    if not found:
        existed = data_dir.exists()
        try:
            CIFAR10(str(data_dir), download=True)
        except Exception as error:  # torchvision raises whatever the network stack does
            if not existed and data_dir.is_dir() and not any(data_dir.iterdir()):
                data_dir.rmdir()
            raise InputError(
                f"no CIFAR-10 under {data_dir}, and downloading it failed ({error}). Put the python version (folder cifar-10-batches-py) "
                "or the binary version (folder cifar-10-batches-bin) there, or point --data-dir at them."
            ) from None
        found = [(data_dir / "cifar-10-batches-py", "")]
    place, end = found[0]
    read = cifar_binary if end else cifar_pickle
    parts = [read(place / f"data_batch_{i}{end}") for i in range(1, 6)]
    images, labels = (torch.from_numpy(np.concatenate(a)) for a in zip(*parts))
    test = place / f"test_batch{end}"
    if test.is_file():
        held_images, held_labels = (torch.from_numpy(a) for a in read(test))
        return ImageData("cifar10", images, labels, held_images, held_labels, 10)
    return hold_out("cifar10", images, labels, 10)


def cifar_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """-> images (10000, 3, 32, 32) uint8, labels (10000,) int64."""
    if not path.is_file():
        raise InputError(f"{path} is missing: the training set has five batches")
    size = path.stat().st_size
    if size != CIFAR_FILE:
        raise InputError(
            f"{path} has {size:,} bytes instead of {CIFAR_FILE:,}: truncated, or not CIFAR-10's binary version. Fetch it again."
        )
    rows = np.fromfile(path, np.uint8).reshape(-1, CIFAR_ROW)
    if rows[:, 0].max() > 9:
        raise InputError(
            f"{path} has labels above 9: this is not CIFAR-10's binary version (CIFAR-100 has two label bytes)"
        )
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)


def cifar_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """-> images (10000, 3, 32, 32) uint8, labels (10000,) int64."""
    if not path.is_file():
        raise InputError(f"{path} is missing: the training set has five batches")
    try:
        with path.open("rb") as file:
            batch = ArrayUnpickler(file, encoding="latin1").load()
        images, labels = np.asarray(batch["data"], np.uint8), np.asarray(batch["labels"], np.int64)
    except Exception as error:  # a damaged pickle can raise nearly anything
        size = path.stat().st_size
        raise InputError(
            f"{path} is not readable ({error}): {size:,} bytes found, about 31,035,000 expected. Fetch it again."
        ) from None
    if images.shape != (10_000, 3072) or labels.shape != (10_000,):
        raise InputError(
            f"{path} holds images of shape {images.shape} and labels of shape {labels.shape}, not (10000, 3072) and (10000,)"
        )
    return images.reshape(-1, 3, 32, 32), labels


# --- ImageNet 64x64 ------------------------------------------------------------------------------------------------------


def npz_member(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and type of one array of an npz file, from its header alone."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
            version = np.lib.format.read_magic(file)
            reader = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = reader(file)
            if (promised := math.prod(shape) * dtype.itemsize) > (
                found := archive.getinfo(f"{key}.npy").file_size
            ):
                raise ValueError(
                    f"its header promises {promised:,} bytes of {key} and {found:,} are there"
                )
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, OSError, EOFError) as error:
        raise InputError(
            f"{path} ({path.stat().st_size:,} bytes) is not a downsampled-ImageNet batch: {error}. Fetch it again."
        ) from None
    return shape, dtype


def imagenet64(data_dir: Path) -> ImageData:
    """The official downsampled ImageNet (arXiv 1707.08819): train_data_batch_1.npz ... 10, with `data` (n, 12288) uint8 and `labels`
    (n,) in 1..1000. Any number of batches; val_data.npz, where there is one, is held out, else 1,000 of the training images.
    All ten take 15.7 GB of memory, and at most one batch (1.6 GB) more while they are read; twice that without val_data.npz.
    """
    paths = sorted(data_dir.glob("train_data_batch_*.npz"), key=lambda p: (len(p.name), p.name))
    if not paths:
        raise InputError(
            f"no train_data_batch_*.npz in {data_dir}: put the official 64x64 npz batches there, or point --data-dir at them"
        )
    images, labels = read_npz(paths)
    if (data_dir / "val_data.npz").is_file():
        return ImageData("imagenet64", images, labels, *read_npz([data_dir / "val_data.npz"]), 1000)
    return hold_out("imagenet64", images, labels, 1000)


def read_npz(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """-> images (N, 3, 64, 64) uint8, labels (N,) in 0..999. Headers are checked before memory is taken."""
    counts = []
    for path in paths:
        (shape, dtype), (label_shape, _) = npz_member(path, "data"), npz_member(path, "labels")
        if len(shape) != 2 or shape[1] != 12288 or dtype != np.uint8 or label_shape != (shape[0],):
            raise InputError(
                f"{path}: `data` is {shape} {dtype} with labels {label_shape}; expected (n, 12288) uint8 and (n,)"
            )
        counts.append(shape[0])
    images, labels = (
        torch.empty(sum(counts), 3, 64, 64, dtype=torch.uint8),
        torch.empty(sum(counts), dtype=torch.long),
    )
    start = 0
    for path, n in zip(tqdm(paths, "reading", leave=False), counts):
        try:
            with np.load(path, allow_pickle=False) as file:
                images[start : start + n] = torch.from_numpy(file["data"].reshape(n, 3, 64, 64))
                labels[start : start + n] = (
                    torch.from_numpy(np.asarray(file["labels"], np.int64)) - 1
                )
        except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError) as error:
            raise InputError(
                f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged: {error}. Fetch it again."
            ) from None
        start += n
    if labels.min() < 0 or labels.max() > 999:
        raise InputError(
            f"labels of {paths[0].parent} run from {labels.min() + 1} to {labels.max() + 1}; the official ones are 1..1000"
        )
    return images, labels


# --- a folder of images --------------------------------------------------------------------------------------------------


def folder(data_dir: Path, image_size: int) -> ImageData:
    """All images below data_dir, as RGB, shorter side resized to image_size and centre-cropped. First-level sub-folders are the
    classes, in alphabetical order (one class if there are none). Unreadable images are named, counted and skipped.
    """
    if not data_dir.is_dir():
        raise InputError(f"{data_dir} is not a folder: point --data-dir at a folder of images")
    paths = sorted(
        p for p in data_dir.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()
    )
    if not paths:
        raise InputError(
            f"no images in {data_dir} (looked for {', '.join(IMG_EXTENSIONS)}, sub-folders included)"
        )
    group = [p.relative_to(data_dir).parts[0] if p.parent != data_dir else "" for p in paths]
    classes = sorted(set(group))
    images, labels, skipped = [], [], []
    for path, label in zip(tqdm(paths, "reading", leave=False), group):
        try:
            with Image.open(path) as image:
                image = center_crop(
                    resize(flatten(image), image_size, antialias=True), [image_size, image_size]
                )
                images.append(np.array(image).transpose(2, 0, 1))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            skipped.append(path)
            tqdm.write(f"skipping {path}: {error}")
            continue
        labels.append(classes.index(label))
    if skipped:
        print(f"{len(skipped)} of {len(paths)} images could not be read and were skipped")
    if not images:
        raise InputError(f"none of the {len(paths)} images in {data_dir} could be read")
    return hold_out(
        "folder", torch.from_numpy(np.stack(images)), torch.tensor(labels), len(classes)
    )


def collected(parts: Iterable[Tensor], folder: Path | None = None) -> Tensor:
    """torch.cat(parts), in memory. With a folder, they go one by one into a file there, which is mapped and then has no name, so that they
    need not fit into memory and nothing is left behind. Raises InputError if the disk is full."""
    if folder is None:
        return torch.cat(list(parts))
    count = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            for part in parts:
                file.write(memoryview(part.contiguous().view(torch.uint8).flatten().numpy()))
                count += len(part)
        tensor = torch.from_file(file.name, size=count * part[0].numel(), dtype=part.dtype).view(
            count, *part.shape[1:]
        )
    except OSError as error:
        raise InputError(
            f"{folder} cannot hold the data that is prepared there ({error.strerror}): make room, or choose another --out"
        ) from None
    finally:
        with suppress(NameError, OSError):  # a system that cannot remove a mapped file keeps it
            os.unlink(file.name)
    return tensor


def captioned_folder(
    data_dir: Path, image_size: int, folder: Path | None = None
) -> tuple[list[str], Tensor]:
    """Captioned pictures: metadata.jsonl with a `file_name` and a `text` per line (the image-folder convention of the datasets library).
    -> captions, pictures (n, 3, image_size, image_size) uint8, resized and centre-cropped, in an order shuffled once and for all. The
    pictures are kept on disk, if a folder for them is given. Raises InputError, naming the line, for anything missing; unreadable images
    are named and skipped.
    """
    listing = data_dir / "metadata.jsonl"
    if not listing.is_file():
        raise InputError(
            f'{listing} is missing: captioned pictures need it, with one line of JSON each, like {{"file_name": "a.png", "text": "a cat"}}'
        )
    captions, skipped, entries = [], [], []
    try:
        lines = listing.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{listing} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{listing}, line {number}: no file_name and text in it ({error})"
            ) from None
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            raise InputError(f"{listing}, line {number}: {name} has no caption")
        entries.append((name, text.strip()))

    def readable() -> Iterator[Tensor]:
        for index in tqdm(
            np.random.default_rng(0).permutation(len(entries)), "reading", leave=False
        ):
            name, text = entries[index]
            try:
                with Image.open(data_dir / name) as image:
                    image = center_crop(
                        resize(flatten(image), image_size, antialias=True), [image_size, image_size]
                    )
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                tqdm.write(f"skipping {name}: {error}")
                skipped.append(name)
                continue
            captions.append(text)
            yield torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        if not captions:
            raise InputError(f"none of the pictures that {listing} names could be read")

    pictures = collected(readable(), folder)
    if skipped:
        print(f"{len(skipped)} of {len(entries)} pictures could not be read and were skipped")
    return captions, pictures


def flatten(image: Image.Image) -> Image.Image:
    """To RGB, transparent parts on black."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert(
        "RGB"
    )
