import dataclasses

import numpy as np
import torch

from mcm.lab.data import to_float
from mcm.latent import shapes


def some(n=300):
    pool = shapes.choose(shapes.scenes(), n, 1)
    return pool, shapes.draw(pool, 2)


def test_every_scene_has_a_caption_of_its_own_and_none_hides_an_object():
    everything = shapes.scenes()
    assert len(everything) == len({s.caption() for s in everything}) == 9180
    assert (
        shapes.Scene(
            (shapes.Object("small", "red", "circle"), shapes.Object("large", "blue", "square")),
            "above",
            "black",
        )
        in everything
    )
    assert all(s.background not in {o.colour for o in s.objects} for s in everything)


def test_held_out_captions_hold_out_what_they_say_whatever_the_background():
    train, held = shapes.split_scenes()
    said = [{(s.objects, s.relation) for s in part} for part in (train, held)]
    assert not said[0] & said[1] and len(said[1]) == sum(map(len, said)) // 10
    assert len(train) + len(held) == 9180


def test_the_reader_is_right_on_pictures_drawn_and_on_noisy_ones():
    pool, pictures = some(1000)
    assert shapes.alignment(pictures, pool).double().mean() > 0.995
    noisy = to_float(pictures) + 0.1 * torch.randn(pictures.shape)
    assert shapes.alignment(noisy, pool).double().mean() > 0.98


def test_the_reader_is_wrong_on_every_other_caption():
    pool, pictures = some()
    assert shapes.alignment(pictures, pool[1:] + pool[:1]).sum() <= 2
    for change in ({"size": "x"}, {"colour": "x"}, {"shape": "x"}):
        other = [
            dataclasses.replace(
                s, objects=(dataclasses.replace(s.objects[0], **change), *s.objects[1:])
            )
            for s in pool
        ]
        assert not shapes.alignment(pictures, other).any()
    assert not shapes.alignment(
        pictures, [dataclasses.replace(s, relation="x") for s in pool]
    ).any()


def test_the_reader_takes_no_doubtful_colour_shape_or_speck():
    scene = shapes.Scene((shapes.Object("large", "red", "circle"),), None, "black")
    picture = shapes.draw([scene], 0)[0].float() / 255
    assert shapes.read(picture) == scene
    inside = (picture[0] > 0.5).nonzero()
    orange = picture.clone()
    orange[1][picture[0] > 0.3] = 0.45
    assert shapes.read(orange) is None
    speck = picture.clone()
    speck[:, :3, 15:18] = torch.tensor([0.95, 0.85, 0.1])[:, None, None]
    assert shapes.read(speck) != scene
    half = picture.clone()
    middle = inside[:, 1].float().mean()
    half[:, :, int(middle) :] = 0.12  # half a disc
    read = shapes.read(half)
    assert read is None or read.objects != scene.objects
    assert shapes.read(np.zeros((3, 32, 32))) is None
    assert shapes.read(torch.rand(3, 32, 32)) is None


def test_the_order_in_which_two_objects_are_found_does_not_matter():
    a, b = shapes.Object("small", "red", "circle"), shapes.Object("large", "blue", "square")
    assert shapes.agrees(
        shapes.Scene((a, b), "above", "black"), shapes.Scene((b, a), "below", "black")
    )
    assert not shapes.agrees(
        shapes.Scene((a, b), "above", "black"), shapes.Scene((b, a), "above", "black")
    )
    assert shapes.agrees(shapes.Scene((a,), None, "white"), shapes.Scene((a,), None, "anything"))


def test_the_same_seed_draws_the_same_pictures_and_another_one_others():
    pool, pictures = some(20)
    assert torch.equal(shapes.draw(pool, 2), pictures)
    assert not any(torch.equal(a, b) for a, b in zip(shapes.draw(pool, 3), pictures))
