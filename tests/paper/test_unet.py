import pytest
import torch

import mcm


@pytest.mark.parametrize(
    "arguments, millions",
    [
        (
            dict(
                image_size=8,
                in_channels=1,
                channels=32,
                multipliers=(1, 2),
                attention=(4,),
                classes=10,
            ),
            (0.5, 1),
        ),
        (dict(image_size=32, channels=32, classes=10), (1, 2)),
        (
            dict(
                image_size=32,
                channels=128,
                multipliers=(1, 2, 2),
                blocks=3,
                attention=(16, 8),
                classes=10,
            ),
            (25, 60),
        ),
        (
            dict(
                image_size=64,
                channels=32,
                multipliers=(1, 2, 3, 4),
                blocks=1,
                attention=(8,),
                classes=1000,
            ),
            (1, 60),
        ),
    ],
)
def test_sizes_and_shapes(arguments, millions):
    net = mcm.UNet(**arguments)
    low, high = millions
    assert low < sum(p.numel() for p in net.parameters()) / 1e6 < high
    shape = (2, net.arguments["in_channels"], *[net.arguments["image_size"]] * 2)
    output = net(torch.randn(shape), torch.tensor([0.1, 1.0]), torch.tensor([0, net.classes]))
    assert output.shape == shape and (output == 0).all()  # zero-initialised output


def test_time_class_and_image_are_heard(network):
    z, t, y = torch.randn(1, 1, 8, 8), torch.tensor([0.5]), torch.tensor([1])
    base = network(z, t, y)
    far = z.clone()
    far[..., 0, 0] += 1
    assert (network(far, t, y) - base)[
        ..., 7, 7
    ].abs() > 1e-6  # attention carries one corner to the other
    for changed in (network(z, t + 1 / 1280, y), network(z, t, y + 1), network(z, t, None)):
        assert not torch.allclose(changed, base, atol=1e-6)
    assert torch.equal(
        network(z, t, None), network(z, t, torch.tensor([3]))
    )  # the label `classes` is "no class"


def test_samples_do_not_see_each_other(network):
    z, t, y = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3])
    together = network(z, t, y)
    for b in range(4):
        torch.testing.assert_close(
            network(z[b : b + 1], t[b : b + 1], y[b : b + 1]),
            together[b : b + 1],
            rtol=1e-4,
            atol=1e-5,
        )


def test_sizes_that_do_not_fit():
    with pytest.raises(mcm.InputError, match="30 is not divisible by 4"):
        mcm.UNet(image_size=30)
    with pytest.raises(mcm.InputError, match="multiple of 8"):
        mcm.UNet(channels=20)
