import pytest
import torch

import mcm

COSINE = mcm.CosineSchedule()
CLIPPED = mcm.CosineSchedule(clip=15.0)


@pytest.mark.parametrize("prediction", ["v", "epsilon", "x"])
def test_predictions_agree_on_x_hat(prediction):
    """A network that knows the image answers in its own terms; the denoiser translates back."""
    x, eps = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    t = torch.linspace(0.05, 1, 6, dtype=torch.float64)
    alpha, sigma = (a.view(-1, 1, 1, 1) for a in CLIPPED(t))
    answer = {"v": alpha * eps - sigma * x, "epsilon": eps, "x": x}[prediction]
    denoiser = mcm.Denoiser(lambda z, t, cond: answer, CLIPPED, prediction)
    # epsilon divides by alpha_1 = 5.5e-4
    torch.testing.assert_close(denoiser(alpha * x + sigma * eps, t), x, rtol=0, atol=1e-11)


def test_at_t_zero_the_answer_is_z_without_a_call():
    def refuse(z, t, cond):
        raise AssertionError("called")

    z = torch.randn(3, 2, 4, 4)
    assert torch.equal(mcm.Denoiser(refuse, COSINE)(z, torch.zeros(3)), z)
    mixed = mcm.Denoiser(lambda z, t, cond: z / 0, COSINE, "x")(z, torch.tensor([0.0, 0.5, 0.0]))
    assert torch.equal(mixed[[0, 2]], z[[0, 2]]) and not mixed[1].isfinite().any()


def test_epsilon_prediction_needs_signal_at_one():
    with pytest.raises(mcm.InputError, match="clip the schedule"):
        mcm.Denoiser(torch.nn.Identity(), COSINE, "epsilon")
    with pytest.raises(mcm.InputError, match="prediction must be"):
        mcm.Denoiser(torch.nn.Identity(), COSINE, "score")


def test_dtypes(network):
    z, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 1.0]), torch.tensor([0, 2])
    reference = mcm.Denoiser(network, COSINE)(z, t, y)
    assert reference.dtype == torch.float32
    wide = mcm.Denoiser(network.double(), COSINE)(z.double(), t.double(), y)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), reference, rtol=1e-4, atol=1e-4)
    half = mcm.Denoiser(network.bfloat16(), COSINE)(z.bfloat16(), t, y)
    assert (
        half.dtype
        == mcm.Denoiser(network, COSINE)(z.bfloat16(), torch.zeros(2), y).dtype
        == torch.float32
    )
    torch.testing.assert_close(
        half, reference, rtol=0.1, atol=0.1
    )  # bfloat16 keeps 8 bits; 20 layers


def test_a_discrete_network_gets_the_index():
    seen = []
    schedule = mcm.DiscreteSchedule(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64))
    network = lambda z, t, cond: seen.append(t) or torch.zeros_like(z)  # noqa: E731
    mcm.Denoiser(network, schedule, "epsilon")(
        torch.randn(3, 1), torch.tensor([0.001, 0.2504, 1.0])
    )
    assert seen[0].tolist() == [0, 249, 999]


def test_guidance_convention(network):
    denoiser, z, t = mcm.Denoiser(network, COSINE), torch.randn(4, 1, 8, 8), torch.full((4,), 0.6)
    y, null = torch.tensor([0, 1, 2, 0]), torch.tensor(3)
    x_cond, x_null = denoiser(z, t, y), denoiser(z, t, None)
    ulp = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mcm.guided(denoiser, 1.0, null)(z, t, y), x_cond, **ulp)
    torch.testing.assert_close(mcm.guided(denoiser, 0.0, null)(z, t, y), x_null, **ulp)
    torch.testing.assert_close(
        mcm.guided(denoiser, 8.0, null)(z, t, y), x_cond + 7 * (x_cond - x_null), **ulp
    )  # omega = w - 1
    numbered = mcm.guided(denoiser, 0.0, 3)
    torch.testing.assert_close(numbered(z, t, y), x_null, **ulp)
    per_sample = mcm.guided(denoiser, torch.tensor([1.0, 8.0, 0.0, 8.0]), null)(z, t, y)
    torch.testing.assert_close(per_sample[0], x_cond[0], **ulp)
    torch.testing.assert_close(per_sample[2], x_null[2], **ulp)


@pytest.mark.parametrize("shape", [(1,), (2,), (2, 3, 3)])
def test_mixture_is_the_posterior_mean(shape):
    """Against self-normalised sums over 400,000 draws of x, weighted by p(z_t | x)."""
    means, stds, weights = (
        torch.randn(3, *shape).double(),
        torch.tensor([0.5, 1.0, 0.7]).double(),
        torch.tensor([0.2, 0.5, 0.3]).double(),
    )
    mixture = mcm.GaussianMixture(means, stds, weights)
    x = mixture.sample(400_000)
    for t in (0.55, 0.8, 0.95, 1.0):
        t = torch.tensor([t]).double()
        alpha, sigma = COSINE(t)
        z = alpha * x[:1] + sigma * torch.randn(1, *shape).double()
        log_p = -(z - alpha * x).flatten(1).square().sum(1) / (2 * sigma**2)
        p = log_p.softmax(0)
        expected = (p[:, None] * x.flatten(1)).sum(0)
        error = (
            (p[:, None] ** 2 * (x.flatten(1) - expected) ** 2).sum(0).sqrt()
        )  # the standard error of that mean
        assert ((mixture(z, t).flatten() - expected).abs() < 5 * error).all()


def test_mixture_edges_and_conditions():
    mixture = mcm.GaussianMixture(
        torch.tensor([[-1.0], [1.0]]), torch.tensor([0.2, 0.3]), torch.tensor([0.25, 0.75])
    )
    z = torch.randn(3, 1)
    assert torch.equal(mixture(z, torch.zeros(3)), z)
    torch.testing.assert_close(mixture(z, torch.ones(3)), torch.full((3, 1), 0.5))  # the prior mean
    of_double = mcm.GaussianMixture(
        mixture.means.double(), mixture.stds.double(), mixture.weights.double()
    )  # answers in z's precision
    torch.testing.assert_close(
        of_double(z, torch.full((3,), 0.5)), mixture(z, torch.full((3,), 0.5))
    )
    component = mixture(z, torch.ones(3), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(component[:, 0], torch.tensor([-1.0, 1.0, 0.5]))
    with pytest.raises(mcm.InputError):
        mcm.GaussianMixture(torch.zeros(2, 1), torch.tensor([1.0, 0.0]))
