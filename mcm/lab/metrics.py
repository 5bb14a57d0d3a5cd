"""How good are the samples: Frechet distance, precision and recall, in the features of a small classifier trained on the spot.

These are not FID: that name belongs to the features of Inception-v3, which can be had too. Every number comes with its feature space.
"""

import io
import pickle
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..denoiser import read_safetensors, write_safetensors
from ..errors import InputError
from .data import ImageData, to_float
from .run import batch_indices


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between normals fitted to the rows of a (n, d) and b (m, d), in float64:

        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))          (arXiv 1706.08500, eq. 6)

    tr (S_a S_b)^(1/2) = tr (S_a^(1/2) S_b S_a^(1/2))^(1/2), a symmetric matrix, whose eigenvalues are real even when S_a is singular.
    """
    (mu_a, s_a), (mu_b, s_b) = moments(a), moments(b)
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp_min(0).sqrt().sum()
    return ((mu_a - mu_b).square().sum() + s_a.trace() + s_b.trace() - 2 * cross).item()


def moments(a: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of the rows of a (n, d), in float64 but without a copy of them all."""
    mean, centred = a.mean(0, dtype=torch.float64), (part.double() for part in a.split(chunk))
    return mean, sum((part - mean).T @ (part - mean) for part in centred) / (len(a) - 1)


def precision_recall(
    real: Tensor, fake: Tensor, k: int = 3, most: int = 10_000, chunk: int = 2048
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): the share of fake samples inside the real manifold, and of real ones inside
    the fake manifold; a manifold is the union of balls around samples that reach to their k-th nearest neighbour. real, fake: (n, d);
    of more than `most` rows, so many are drawn, as the cost grows with the square. (Not at even distances: classes come in turn.)
    """
    real, fake = (
        a[torch.randperm(len(a), generator=torch.Generator().manual_seed(0))[:most]]
        if len(a) > most
        else a
        for a in (real, fake)
    )

    def inside(points: Tensor, manifold: Tensor) -> float:
        radius = torch.cat(
            [
                torch.cdist(rows, manifold).kthvalue(k + 1, dim=1).values
                for rows in manifold.split(chunk)
            ]
        )
        return (
            torch.cat(
                [(torch.cdist(rows, manifold) <= radius).any(1) for rows in points.split(chunk)]
            )
            .double()
            .mean()
            .item()
        )

    return inside(fake, real), inside(real, fake)


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """The share of real samples (n, d) with a fake one (m, d) nearer than their k-th real neighbour (arXiv 2002.09797)."""
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values
    return (torch.cdist(real, fake).min(1).values <= radius).double().mean().item()


def principal_components(latents: Tensor, k: int = 16) -> Callable[[Tensor], Tensor]:
    """-> a function from latents (m, C, h, w) to features (m, k): their k leading principal components over `latents` (n, C, h, w), each of
    variance 1 there. Latents of more than 8x8 are averaged to that first. What a picture shows moves them, so does what is blurred or
    mixed in it; nothing is trained."""

    def flat(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.double(), min(8, x.shape[-1])).flatten(1)

    mean = flat(latents).mean(0)
    _, spread, directions = torch.linalg.svd(flat(latents) - mean, full_matrices=False)
    scaled = directions[:k].T / spread[:k] * len(latents) ** 0.5
    return lambda x: (flat(x) - mean) @ scaled


def nearest(queries: Tensor, images: Tensor, chunk: int = 8192) -> Tensor:
    """For each query (n, C, H, W) the index of the nearest of images (uint8), by pixel distance: (n,)."""
    distance = torch.cat(
        [
            torch.cdist(queries.flatten(1), to_float(part).flatten(1))
            for part in images.split(chunk)
        ],
        dim=1,
    )
    return distance.argmin(1)


class Classifier(nn.Module):
    """Three convolutions, halving until 4 pixels are left, and 64 features; features(x): (B, C, H, W) in [-1, 1] -> (B, 64)."""

    DIM = 64

    def __init__(self, image_shape: tuple[int, ...], classes: int, channels: int = 32):
        super().__init__()
        layers, c, size = [], image_shape[0], image_shape[1]
        while True:
            layers += [nn.Conv2d(c, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            c, channels = channels, channels * 2
            if size < 8:
                break
            layers.append(nn.MaxPool2d(2))
            size //= 2
        self.body = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * c, self.DIM)
        )
        self.head = nn.Linear(self.DIM, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)))


def embed(
    extractor: "Classifier | Inception", images: Tensor, chunk: int = 1000
) -> tuple[Tensor, Tensor | None]:
    """images (uint8, or float in [-1, 1]) -> features (n, extractor.DIM), predicted classes (n,), which Inception has none of; on the CPU."""
    features, classes = [], []
    with torch.no_grad():
        for part in images.split(chunk):
            found = extractor.features(to_float(part) if part.dtype == torch.uint8 else part)
            features.append(found.cpu())
            if extractor.head:
                classes.append(extractor.head(F.relu(found)).argmax(1).cpu())
    return torch.cat(features), torch.cat(classes) if classes else None


def train_classifier(
    data: ImageData, iterations: int, path: Path, batch: int = 128
) -> tuple[Classifier, float]:
    """The feature extractor for `data`, trained with a fixed seed (its features do not depend on the run's seed), and its accuracy on
    the held-out images. Cached at `path`; a cache made for other data is refused with an InputError.
    """
    device = data.images.device
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path.parent} cannot be made for the feature classifier ({error.strerror}): use another --features"
        ) from None
    classifier = Classifier(data.image_shape, data.classes)
    wanted = {"data": data.name, "fingerprint": data.fingerprint(), "iterations": iterations}
    if path.is_file():
        tensors, metadata = read_safetensors(path)
        if metadata != wanted:
            raise InputError(
                f"{path} holds a feature classifier for {metadata}, but this run needs {wanted}: delete it or use another --features"
            )
        classifier.load_state_dict(tensors)
    classifier.to(device)
    if not path.is_file():
        with torch.random.fork_rng(
            [] if device.type == "cpu" else [device], device_type=device.type
        ):
            torch.manual_seed(0)
            classifier = Classifier(data.image_shape, data.classes).to(device).train()
            optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, iterations)
            for step in tqdm(range(iterations), "feature classifier", leave=False, unit="it"):
                rows = batch_indices(len(data.images), batch, step, seed=0).to(device)
                loss = F.cross_entropy(classifier(to_float(data.images[rows])), data.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        write_safetensors(path, classifier.state_dict(), wanted)
    classifier.eval().requires_grad_(False)
    return classifier, (
        embed(classifier, data.held_images)[1] == data.held_labels.cpu()
    ).double().mean().item()


class Inception(nn.Module):
    """The network and the resizing that FID is defined with (arXiv 1706.08500), from torch-fidelity: images as 8-bit RGB, 2048 features.

    Its weights are looked for where PyTorch keeps downloads, and fetched there once. Raises InputError, naming file and place, if they
    are not to be had, and without torch-fidelity.
    """

    DIM, head = 2048, None

    def __init__(self):
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as port
        except ImportError:
            raise InputError(
                "FID needs torch-fidelity: pip install -r requirements-fid.txt"
            ) from None
        path = Path(torch.hub.get_dir()) / "checkpoints" / port.URL_INCEPTION_V3.rsplit("/", 1)[1]
        if not path.is_file():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(port.URL_INCEPTION_V3, path, hash_prefix="6726825d")
            except (OSError, RuntimeError, HTTPException) as error:
                raise InputError(
                    f"FID needs the weights of Inception-v3, which could not be fetched ({error}). Put {port.URL_INCEPTION_V3} into {path.parent}"
                ) from None
        with (
            io.BytesIO() as safe
        ):  # read as tensors only, before torch-fidelity reads it as anything
            try:
                torch.save(torch.load(path, weights_only=True, map_location="cpu"), safe)
                safe.seek(0)
                self.network = port.FeatureExtractorInceptionV3(
                    "inception", ["2048"], feature_extractor_weights_path=safe
                )
            except (
                pickle.UnpicklingError,
                RuntimeError,
                EOFError,
                AttributeError,
                TypeError,
            ) as error:
                raise InputError(
                    f"{path} is not the weights of Inception-v3 ({str(error).splitlines()[0]}): delete it"
                ) from None

    def features(self, x: Tensor) -> Tensor:
        pixels = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return torch.cat(
            [self.network(part)[0] for part in pixels.expand(-1, 3, -1, -1).split(100)]
        )
