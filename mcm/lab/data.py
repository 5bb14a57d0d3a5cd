"""Images in memory as bytes: digits, CIFAR-10, ImageNet 64x64, any folder of images, with captions.

And which of them make up the batch of a step.
"""

import csv
import hashlib
import io
import json
import os
import pickle
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import center_crop, resize
from tqdm import tqdm

from ..errors import InputError

BACKGROUND = "black"  # of transparent images


@dataclass
class ImageData:
    """images: (N, C, H, W) uint8; labels: (N,) int64 in [0, classes); held_*: never trained on."""

    name: str
    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor
    classes: int

    def to(self, device: torch.device) -> "ImageData":
        names = ("images", "labels", "held_images", "held_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)"""
        return tuple(self.images.shape[1:])

    def fingerprint(self) -> str:
        """12 hex digits that change with the training images or labels.

        From at most 4,096 of them: enough to tell data sets apart.
        """
        rows = torch.linspace(0, len(self.images) - 1, min(len(self.images), 4096)).long()
        total = hashlib.sha256(f"{self.name} {len(self.images)} ".encode())
        for a in (self.images, self.labels):
            total.update(a[rows.to(a.device)].cpu().numpy().tobytes())
        return total.hexdigest()[:12]


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def fingerprint(images: Tensor | None, *about) -> str:
    """8 hex digits that change with what images come with, or with every fiftieth image."""
    total = hashlib.sha256(repr(about).encode())
    if images is not None:
        total.update(images[::50].cpu().numpy().tobytes())
    return total.hexdigest()[:8]


def mixed(*numbers: int) -> int:
    """One 32-bit seed from several numbers: PyTorch's CPU generator ignores all higher bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed(seed, epoch, n)))


def batch_indices(n: int, batch: int, step: int, seed: int) -> Tensor:
    """Which of n images make up the batch of this step, (batch,).

    Shuffled passes over the data, as a function of the step alone.
    """
    position = torch.arange(step * batch, (step + 1) * batch)
    epochs = range(int(position[0]) // n, int(position[-1]) // n + 1)
    return torch.cat(
        [permutation(n, seed, e)[position[position // n == e] - e * n] for e in epochs]
    )


def load_data(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    background: str = BACKGROUND,
) -> ImageData:
    """name: "digits", "cifar10", "imagenet64" or "folder".

    image_size: what a folder's images are resized to, and the others' are averaged down to; None:
        64 for a folder, else as they are. background: of a folder's transparent images.
    Raises InputError, naming the file, for anything missing, truncated or of the wrong shape.
    """
    readers = {"digits": digits, "cifar10": cifar10, "imagenet64": imagenet64}
    if name == "folder":
        return folder(Path(data_dir), image_size or 64, background)
    if name in readers:
        return downsample(readers[name](Path(data_dir)), image_size)
    raise InputError(f"unknown data set {name!r}: choose digits, cifar10, imagenet64 or folder")


def downsample(data: ImageData, image_size: int | None) -> ImageData:
    """The same images in fewer pixels, each the mean of a square.

    Raises InputError if the squares do not come out even.
    """
    size = data.image_shape[-1]
    if image_size in (None, size):
        return data
    if image_size < 1 or size % image_size:
        choice = f"choose {size}, {size // 2} or {size // 4}"
        raise InputError(f"{size} pixels cannot be averaged down to {image_size}: {choice}")
    square = size // image_size
    images, held_images = (
        torch.cat([F.avg_pool2d(part.float(), square).round().byte() for part in a.split(10_000)])
        for a in (data.images, data.held_images)
    )
    return replace(data, images=images, held_images=held_images)


def hold_out(
    name: str,
    images: Tensor,
    labels: Tensor,
    classes: int,
    n: int | None = None,
    each: bool = False,
) -> ImageData:
    """Set n random images aside (default: a tenth, at most 1,000): the same whatever the seed.

    each: but leave one of each class to learn from.
    """
    if len(images) < 20:
        raise InputError(
            f"{len(images)} images are too few: at least 20, and thousands to learn anything"
        )
    n = min(1000, len(images) // 10) if n is None else n
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held = order[:n].sort().values
    kept = order[n:].sort().values
    if each:
        lost = sorted(set(labels[held].tolist()) - set(labels[kept].tolist()))
        back = [held[labels[held] == label][:1] for label in lost]
        kept = torch.cat([kept, *back]).sort().values
        held = held[~torch.isin(held, kept)]
    return ImageData(name, images[kept], labels[kept], images[held], labels[held], classes)


def digits(data_dir: Path | None = None) -> ImageData:
    """1,797 scanned digits of 8x8 pixels, which scikit-learn's package contains; 297 held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    return hold_out("digits", images, torch.from_numpy(bunch.target).long(), 10, 297)


# --- CIFAR-10 -------------------------------------------------------------------------------------


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain containers and numpy arrays (as the python version's), no others."""

    def find_class(self, module: str, name: str):
        array = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        if array or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 file needs")


def cifar10(data_dir: Path) -> ImageData:
    """50,000 training images of 10 classes.

    The test batch, where there is one, is held out, else 1,000 of the training images. Looks for
    data_batch_1 ... 5 (python version) or data_batch_1.bin ... (binary version) in data_dir and its
    usual sub-folders, and downloads the python version through torchvision if there is neither.
    """
    places = (data_dir, data_dir / "cifar-10-batches-py", data_dir / "cifar-10-batches-bin")
    candidates = [(place, end) for place in places for end in ("", ".bin")]
    found = [(p, end) for p, end in candidates if (p / f"data_batch_1{end}").is_file()]
    if not found:
        download_cifar10(data_dir)
        found = [(data_dir / "cifar-10-batches-py", "")]
    place, end = found[0]
    parts = [cifar_batch(place / f"data_batch_{i}{end}") for i in range(1, 6)]
    images, labels = (torch.from_numpy(np.concatenate(a)) for a in zip(*parts))
    test = place / f"test_batch{end}"
    if test.is_file():
        held_images, held_labels = (torch.from_numpy(a) for a in cifar_batch(test))
        return ImageData("cifar10", images, labels, held_images, held_labels, 10)
    return hold_out("cifar10", images, labels, 10)


def download_cifar10(data_dir: Path) -> None:
    existed = data_dir.exists()
    try:
        CIFAR10(str(data_dir), download=True)
    except Exception as error:  # torchvision raises whatever the network stack does
        if not existed and data_dir.is_dir() and not any(data_dir.iterdir()):
            data_dir.rmdir()
        raise InputError(
            f"no CIFAR-10 under {data_dir}, and downloading it failed ({error}). Point --data-dir "
            "at cifar-10-batches-py (the python version) or cifar-10-batches-bin (the binary one)"
        ) from None


def cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """-> images (10000, 3, 32, 32) uint8, labels (10000,) int64, from either version."""
    if not path.is_file():
        raise InputError(f"{path} is missing: the training set has five batches")
    try:
        if path.suffix == ".bin":  # a label byte, then red, green and blue planes
            rows = np.fromfile(path, np.uint8).reshape(10_000, 3073)
            images, labels = rows[:, 1:], rows[:, 0]
        else:
            with path.open("rb") as file:
                batch = ArrayUnpickler(file, encoding="latin1").load()
            images, labels = np.asarray(batch["data"], np.uint8), np.asarray(batch["labels"])
        images = images.reshape(10_000, 3, 32, 32)
        labels = labels.reshape(10_000).astype(np.int64)
        if labels.max() > 9:
            raise ValueError("labels above 9, as in CIFAR-100")
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(
            f"{path} ({path.stat().st_size:,} bytes) is not a batch of CIFAR-10: {error}"
        ) from None
    return images, labels


# --- ImageNet 64x64 -------------------------------------------------------------------------------


def npz_array(path: Path, key: str, shape: tuple[int, ...], dtype: type) -> Tensor:
    """One array of a batch, in this shape. Raises InputError if it is damaged, or another."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(
                file[key].reshape(shape).astype(dtype, casting="same_kind", copy=False)
            )
    except (BadZipFile, zlib.error, LookupError, ValueError, TypeError, OSError, MemoryError) as e:
        raise InputError(
            f"{path} ({path.stat().st_size:,} bytes) is not a batch of downsampled ImageNet, or is "
            f"damaged ({key}: {e})"
        ) from None


def imagenet64(data_dir: Path) -> ImageData:
    """The official downsampled ImageNet (arXiv 1707.08819): train_data_batch_1.npz ... 10.

    With `data` (n, 12288) uint8 and `labels` (n,) in 1..1000. Any number of batches; val_data.npz,
    where there is one, is held out, else 1,000 of the training images. All ten take 15.7 GB of
    memory, and at most one batch (1.6 GB) more while they are read; twice that without
    val_data.npz.
    """
    paths = sorted(data_dir.glob("train_data_batch_*.npz"), key=lambda p: (len(p.name), p.name))
    if not paths:
        raise InputError(
            f"no train_data_batch_*.npz in {data_dir}: point --data-dir at the official batches"
        )
    images, labels = read_npz(paths)
    validation = data_dir / "val_data.npz"
    if validation.is_file():
        return ImageData("imagenet64", images, labels, *read_npz([validation]), 1000)
    return hold_out("imagenet64", images, labels, 1000)


def read_npz(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """-> images (N, 3, 64, 64) uint8, labels (N,) in 0..999. Labels first: they tell the size."""
    by_file = [npz_array(path, "labels", (-1,), np.int64) - 1 for path in paths]
    images = torch.empty(sum(map(len, by_file)), 3, 64, 64, dtype=torch.uint8)
    parts = images.split([len(own) for own in by_file])
    for path, part in zip(tqdm(paths, "reading", leave=False), parts):
        part.copy_(npz_array(path, "data", tuple(part.shape), np.uint8))
    labels = torch.cat(by_file)
    if labels.min() < 0 or labels.max() > 999:
        found = f"from {labels.min() + 1} to {labels.max() + 1}"
        raise InputError(f"labels of {paths[0].parent} run {found}; the official ones are 1..1000")
    return images, labels


# --- folders of images ----------------------------------------------------------------------------


EXTENSIONS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", ".avif")
SPLIT = re.compile(
    "(train|training|val|valid|validation|dev|eval|test|testing)([-_ ]?(set|data|images|[0-9]+))*",
    re.IGNORECASE,
)


def is_transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def flatten(image: Image.Image, background: str = BACKGROUND) -> Image.Image:
    """Upright, in RGB, transparent parts on the background. 16 bits become 8.

    Raises ValueError for values whose range the file does not tell.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("it holds 32-bit numbers, and nothing says which is white")
    if not is_transparent(image):
        return image.convert("RGB")
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(ground, image).convert("RGB")


def printable(path: object) -> str:
    """Its name, on one line; a file's may hold line ends, and bytes that are no text."""
    text = os.fsencode(str(path)).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def read_images(
    paths: Sequence[Path], image_size: int, background: str = BACKGROUND
) -> Iterator[tuple[int, Tensor]]:
    """The index and the pixels of each image that can be read: (3, image_size, image_size) uint8.

    As `flatten` has them, the shorter side resized and the centre cut out. Others are named,
    counted and skipped.
    """
    skipped = transparent = 0
    for index, path in enumerate(tqdm(paths, "reading", leave=False)):
        try:
            with Image.open(path) as image:
                see_through = is_transparent(image)
                square = resize(flatten(image, background), image_size, antialias=True)
                square = center_crop(square, [image_size, image_size])
        except Exception as error:  # a decoder raises whatever it does
            skipped += 1
            tqdm.write(f"skipping {printable(path)}: {printable(error)}")
            continue
        transparent += see_through
        yield index, torch.from_numpy(np.array(square)).permute(2, 0, 1)
    if transparent:
        print(f"{transparent:,} images are transparent: shown on {background}")
    if skipped:
        print(f"{skipped} of {len(paths)} images could not be read and were skipped")
    if skipped == len(paths):
        raise InputError(f"none of the {len(paths)} images could be read")


def files_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """In alphabetical order, without what is hidden or macOS's; links to folders are followed.

    above: where the folders above really are: a link to one of them would never end.
    """
    above = above | {os.path.realpath(folder)}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__MACOSX":
            continue
        if path.is_dir():
            if os.path.realpath(path) not in above:
                yield from files_below(path, above)
        elif path.is_file():
            yield path


def folder(data_dir: Path, image_size: int, background: str = BACKGROUND) -> ImageData:
    """All images below data_dir; see `read_images`.

    First-level sub-folders are the classes, in alphabetical order (one class if there are none).
    """
    if not data_dir.is_dir():
        raise InputError(f"{data_dir} is not a folder: point --data-dir at a folder of images")
    files = list(files_below(data_dir))
    paths = [p for p in files if p.suffix.lower() in EXTENSIONS]
    others = sorted({p.suffix.lower() for p in files} - set(EXTENSIONS))
    kinds = printable(", ".join(other or "no ending" for other in others[:10]))
    if not paths:
        found = f"; found {kinds}" if others else ""
        raise InputError(f"no images in {data_dir} (looked for {', '.join(EXTENSIONS)}{found})")
    if others:
        print(f"{len(files) - len(paths)} files that cannot be read here ({kinds}) were left out")
    group, images, inner = [], [], set()
    for index, pixels in read_images(paths, image_size, background):
        images.append(pixels)
        *above, _ = paths[index].relative_to(data_dir).parts
        group.append(above[0] if above else "")
        inner.update(above[1:2])
    classes = sorted(set(group))
    introduce_classes(data_dir, group, classes, sorted(inner))
    labels = torch.tensor([classes.index(name) for name in group])
    return hold_out("folder", torch.stack(images), labels, len(classes), each=True)


def introduce_classes(
    data_dir: Path, group: list[str], classes: list[str], inner: list[str]
) -> None:
    """Say what was taken for a class; a folder may have been meant otherwise.

    group: of each image; inner: names of folders within those of the classes.
    """
    if len(classes) == 1:
        if len(inner) > 1:
            names = f"{printable(', '.join(inner[:5]))}{', ...' * (len(inner) > 5)}"
            there = printable(data_dir / classes[0])
            print(f"one class; if {names} are the classes, point --data-dir at {there}")
        return
    told = [f"{printable(name) or '(in no folder)'} {group.count(name):,}" for name in classes[:20]]
    print(f"{len(classes)} classes: {', '.join(told)}{', ...' * (len(classes) > 20)}")
    if "" in classes:
        print(f"{group.count(''):,} images lie beside the class folders: a class of their own")
    splits = [name for name in classes if SPLIT.fullmatch(name)]
    if len(splits) > 1:
        splits.sort(key=lambda name: not name.lower().startswith("train"))
        inside = data_dir / splits[0]
        print(f"{' and '.join(splits)} look like splits, no classes: point --data-dir at {inside}")


def cat_on_disk(parts: Iterable[Tensor], folder: Path | None = None) -> Tensor:
    """torch.cat(parts), in memory; with a folder, in a file there, which need not fit into memory.

    The file is mapped and then has no name, so that nothing is left behind. Raises InputError if
    the disk is full.
    """
    if folder is None:
        return torch.cat(list(parts))
    count = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            for part in parts:
                file.write(part.contiguous().view(torch.uint8).flatten().numpy().data)
                count += len(part)
        size = count * part[0].numel()
        whole = torch.from_file(file.name, size=size, dtype=part.dtype)
    except OSError as error:
        raise InputError(
            f"{folder} cannot hold data ({error.strerror}): make room, or choose another --out"
        ) from None
    finally:
        with suppress(NameError, OSError):  # a system that cannot remove a mapped file keeps it
            os.unlink(file.name)
    return whole.view(count, *part.shape[1:])


def captioned_folder(
    data_dir: Path, image_size: int, folder: Path | None = None
) -> tuple[list[str], Tensor]:
    """Captioned images, as the image-folder convention of the datasets library has them.

    metadata.jsonl or metadata.csv, here or in sub-folders (see `files_below`), with a `file_name`
    (seen from there) and a `text` or `caption` per line.
    -> captions, images (n, 3, image_size, image_size) uint8 as `read_images` makes them, in an
    order shuffled once and for all. The images are kept on disk, if a folder for them is given.
    Raises InputError, naming the line, for anything missing.
    """
    files = list(files_below(data_dir)) if data_dir.is_dir() else []
    listings = [path for path in files if path.name == "metadata.jsonl"]
    listings = listings or [path for path in files if path.name == "metadata.csv"]
    if not listings:
        there = sorted(p.name for p in data_dir.glob("*"))[:5] if data_dir.is_dir() else "no folder"
        raise InputError(
            f"no metadata.jsonl or metadata.csv in {data_dir}, only {there}: captioned images need "
            f"one, with a line for each, like {EXAMPLE}"
        )
    entries = [entry for listing in listings for entry in captions_of(listing)]
    order = np.random.default_rng(0).permutation(len(entries))
    entries = [entries[i] for i in order]
    kept = []

    def readable() -> Iterator[Tensor]:
        for index, pixels in read_images([path for path, _ in entries], image_size):
            kept.append(entries[index][1])
            yield pixels[None]

    images = cat_on_disk(readable(), folder)
    return kept, images


EXAMPLE = '{"file_name": "a.png", "text": "a cat"}'
CAPTION_KEYS = ("text", "caption")


def captions_of(listing: Path) -> list[tuple[Path, str]]:
    """-> (image, caption) of each line of a metadata.jsonl or metadata.csv."""
    lines: list = read_lines(listing)
    if listing.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(utf8(listing)))
        lines = [(rows.line_num, row) for row in rows]
    entries = []
    several = 0
    for number, line in lines:
        entry: Any = line
        if isinstance(line, str):
            with suppress(ValueError):
                entry = json.loads(line)
        entry = entry if isinstance(entry, dict) else {}
        name: Any = entry.get("file_name")
        text: Any = next((entry[key] for key in CAPTION_KEYS if entry.get(key)), None)
        if isinstance(text, list) and text:
            several += len(text) > 1
            text = text[0]
        if not all(isinstance(part, str) and part.strip() for part in (name, text)):
            found = f"it has {', '.join(map(str, entry))}" if entry else "it cannot be read"
            raise InputError(
                f"{listing}, line {number}: a file_name and a text (or caption) are needed, like "
                f"{EXAMPLE}; {found}"
            )
        entries.append((listing.parent / name, text.strip()))
    if several:
        print(f"{listing}: {several} images have several captions; the first of each is used")
    return entries


def utf8(path: Path) -> str:
    """A text file in UTF-8, with or without a byte-order mark. Raises InputError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error})") from None


def read_lines(path: Path) -> list[tuple[int, str]]:
    """-> (number, text) of each line that is not blank. Raises InputError.

    Only a line feed ends a line: U+2028, for one, may stand within a caption.
    """
    lines = enumerate(utf8(path).split("\n"), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]
