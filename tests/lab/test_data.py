import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import mcm
from mcm.lab import data as module
from mcm.lab.data import (
    captioned_folder,
    cat_on_disk,
    load_data,
    read_images,
    read_lines,
    to_float,
)


def test_digits():
    data = load_data("digits", "")
    assert (
        data.images.shape == (1500, 1, 8, 8)
        and data.images.dtype == torch.uint8
        and data.held_images.shape[0] == 297
    )
    assert (
        data.labels.bincount().min() > 130 and data.images.max() == 255 and data.images.min() == 0
    )
    assert torch.equal(load_data("digits", "").images, data.images)  # the split does not move
    both = torch.cat([data.images, data.held_images]).flatten(1).unique(dim=0)
    assert len(both) > 1780  # held-out images are others than the training images


def test_to_float_reaches_both_ends():
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


# --- CIFAR-10 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar_batch():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (10_000, 3072), dtype=np.uint8), rng.integers(0, 10, 10_000).astype(
        np.uint8
    )


def write_binary(
    folder,
    images,
    labels,
    names=("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"),
):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.bin").write_bytes(np.concatenate([labels[:, None], images], 1).tobytes())


def write_python(folder, images, labels):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(1, 6):
        with open(folder / f"data_batch_{i}", "wb") as file:  # protocol 2, as in the official files
            pickle.dump(
                {
                    "data": images,
                    "labels": labels.tolist(),
                    "batch_label": "x",
                    "filenames": ["a.png"],
                },
                file,
                protocol=2,
            )


def test_both_versions_of_cifar10_read_the_same(tmp_path, cifar_batch):
    images, labels = cifar_batch
    write_binary(tmp_path / "b" / "cifar-10-batches-bin", images, labels)
    write_python(tmp_path / "p" / "cifar-10-batches-py", images, labels)
    binary, python = load_data("cifar10", tmp_path / "b"), load_data("cifar10", tmp_path / "p")
    assert torch.equal(binary.images, python.images) and torch.equal(binary.labels, python.labels)
    assert binary.images.shape == (49_000, 3, 32, 32) and len(binary.held_images) == 1000
    # the folder itself serves too, and with a test batch nothing is taken from the training set
    write_binary(tmp_path / "b" / "cifar-10-batches-bin", images, labels, ["test_batch"])
    whole = load_data("cifar10", tmp_path / "b" / "cifar-10-batches-bin")
    assert len(whole.images) == 50_000 and len(whole.held_images) == 10_000
    assert (
        torch.equal(whole.images[0].flatten(), torch.from_numpy(images[0]))
        and whole.labels[0] == labels[0]
    )


def test_cifar10_that_is_damaged(tmp_path, cifar_batch, monkeypatch):
    images, labels = cifar_batch
    write_binary(tmp_path, images, labels)
    third = tmp_path / "data_batch_3.bin"
    third.write_bytes(third.read_bytes()[:-100])
    with pytest.raises(
        mcm.InputError, match=r"data_batch_3.bin \(30,729,900 bytes\) is not a batch of CIFAR-10"
    ):
        load_data("cifar10", tmp_path)
    third.unlink()
    with pytest.raises(mcm.InputError, match="data_batch_3.bin is missing"):
        load_data("cifar10", tmp_path)
    write_binary(tmp_path, images, labels + 20)
    with pytest.raises(mcm.InputError, match="labels above 9"):
        load_data("cifar10", tmp_path)

    place = tmp_path / "py"
    write_python(place, images, labels)
    (place / "data_batch_2").write_bytes((place / "data_batch_2").read_bytes()[:5000])
    with pytest.raises(mcm.InputError, match=r"data_batch_2 \(5,000 bytes\) is not a batch"):
        load_data("cifar10", place)
    write_python(place, images[:, :100], labels)
    with pytest.raises(mcm.InputError, match=r"size 1000000 into shape \(10000,3,32,32\)"):
        load_data("cifar10", place)

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(module, "CIFAR10", no_network)
    with pytest.raises(mcm.InputError, match="no CIFAR-10 under .*no network.*--data-dir"):
        load_data("cifar10", tmp_path / "empty")


def test_a_pickle_that_would_run_code_is_refused(tmp_path, cifar_batch):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "exploded").touch, ()

    write_python(tmp_path, *cifar_batch)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": Bomb(), "labels": []}))
    with pytest.raises(mcm.InputError, match="which no CIFAR-10 file needs"):
        load_data("cifar10", tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_averaging_down(tmp_path):
    data = load_data("digits")
    small = load_data("digits", image_size=4)
    assert (
        small.images.shape == (1500, 1, 4, 4)
        and small.images.dtype == torch.uint8
        and small.held_images.shape == (297, 1, 4, 4)
    )
    assert torch.equal(small.labels, data.labels)
    squares = data.images.float().reshape(1500, 1, 4, 2, 4, 2).mean((3, 5))
    assert (small.images - squares).abs().max() <= 0.5
    assert small.fingerprint() != data.fingerprint()
    for size in (16, 3, 0, -2):
        with pytest.raises(
            mcm.InputError,
            match=f"8 pixels cannot be averaged down to {size}: choose 8, 4 or 2",
        ):
            load_data("digits", image_size=size)


# --- ImageNet 64x64 -------------------------------------------------------------------------------


def npz(path, n, **changes):
    arrays = (
        dict(
            data=np.full((n, 12288), n, np.uint8),
            labels=np.arange(n) % 1000 + 1,
            mean=np.zeros(12288),
        )
        | changes
    )
    np.savez(path, **arrays)


def test_imagenet64(tmp_path):
    for i in (1, 2, 10):
        npz(tmp_path / f"train_data_batch_{i}.npz", 10 * i)
    npz(tmp_path / "val_data.npz", 7)
    data = load_data("imagenet64", tmp_path)
    assert (
        data.images.shape == (130, 3, 64, 64)
        and data.images[0, 0, 0, 0] == 10
        and data.images[-1, 0, 0, 0] == 100
    )
    assert (
        data.labels.min() == 0
        and data.labels[10] == 0
        and data.classes == 1000
        and len(data.held_images) == 7
    )
    (tmp_path / "val_data.npz").unlink()
    data = load_data("imagenet64", tmp_path)
    assert len(data.images) == 117 and len(data.held_images) == 13


def test_imagenet64_that_is_damaged(tmp_path):
    with pytest.raises(mcm.InputError, match="no train_data_batch"):
        load_data("imagenet64", tmp_path)
    path = tmp_path / "train_data_batch_1.npz"
    npz(path, 20, data=np.zeros((20, 3072), np.uint8))
    with pytest.raises(
        mcm.InputError, match=r"train_data_batch_1.npz .* size 61440 into shape \(20,3"
    ):
        load_data("imagenet64", tmp_path)
    npz(path, 20, data=np.zeros((20, 12288), np.float32))
    with pytest.raises(mcm.InputError, match="data: Cannot cast"):
        load_data("imagenet64", tmp_path)
    np.savez(path, images=np.zeros(3))
    with pytest.raises(mcm.InputError, match="not a batch of downsampled ImageNet"):
        load_data("imagenet64", tmp_path)
    npz(path, 20, labels=np.arange(20))
    with pytest.raises(mcm.InputError, match="run from 0 to 19; the official ones are 1..1000"):
        load_data("imagenet64", tmp_path)
    npz(path, 20)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(
        mcm.InputError, match="train_data_batch_1.npz .100,000 bytes. is not a batch"
    ):
        load_data("imagenet64", tmp_path)
    npz(path, 20)
    content = bytearray(path.read_bytes())
    content[50_000] ^= 255  # inside the data, where only the checksum sees it
    path.write_bytes(content)
    with pytest.raises(mcm.InputError, match="or is damaged .data: Bad CRC"):
        load_data("imagenet64", tmp_path)
    assert zipfile.is_zipfile(path)
    rng = np.random.default_rng(0)
    np.savez_compressed(
        path, data=rng.integers(0, 256, (20, 12288)).astype(np.uint8), labels=np.ones(20, np.int64)
    )
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)  # the beginning of the compressed stream
    path.write_bytes(content)
    with pytest.raises(mcm.InputError, match="is not a batch of downsampled ImageNet"):
        load_data("imagenet64", tmp_path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 12288)}
    )
    np.savez(path, labels=np.ones(20, np.int64))
    with zipfile.ZipFile(path, "a") as archive:  # a header that promises 12 terabytes
        archive.writestr("data.npy", header.getvalue())
    with pytest.raises(mcm.InputError, match="or is damaged .data: "):
        load_data("imagenet64", tmp_path)


# --- a folder -------------------------------------------------------------------------------------


def picture(path, size=(40, 30), colour=(255, 0, 0), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_folder_with_classes(tmp_path):
    for i in range(12):
        picture(tmp_path / "cats" / f"{i}.png")
        picture(tmp_path / "dogs" / "deep" / f"{i}.jpg", (16, 64), (0, 0, 255))
    data = load_data("folder", tmp_path, 16)
    assert data.images.shape == (22, 3, 16, 16) and len(data.held_images) == 2 and data.classes == 2
    everything, labels = (
        torch.cat([data.images, data.held_images]),
        torch.cat([data.labels, data.held_labels]),
    )
    assert (everything[labels == 0][:, 0] == 255).all() and (
        everything[labels == 1][:, 2] > 250
    ).all()  # jpeg is off by one or two


def test_folder_modes_and_corrupt_images(tmp_path, capsys):
    picture(tmp_path / "a.png", (8, 8), (255, 255, 255, 0), "RGBA")
    picture(tmp_path / "b.png", (8, 8), 100, "L")
    for i in range(28):
        picture(tmp_path / f"c{i}.png", (8, 8))
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "notes.txt").write_text("not an image")
    data = load_data("folder", tmp_path, 8)
    out = capsys.readouterr()
    assert "broken.png" in out.out + out.err and "1 of 31 images could not be read" in out.out
    assert len(data.images) + len(data.held_images) == 30 and data.classes == 1
    pixels = torch.cat([data.images, data.held_images])[:, :, 0, 0].tolist()
    assert [0, 0, 0] in pixels and [100, 100, 100] in pixels  # transparent becomes black


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(mcm.InputError, match="not a folder"):
        load_data("folder", tmp_path / "missing", 8)
    with pytest.raises(mcm.InputError, match="no images in"):
        load_data("folder", tmp_path, 8)
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(mcm.InputError, match="none of the 1 images"):
        load_data("folder", tmp_path, 8)
    picture(tmp_path / "y.png")
    with pytest.raises(mcm.InputError, match="1 images are too few"):
        load_data("folder", tmp_path, 8)
    with pytest.raises(mcm.InputError, match="unknown data set 'mnist'"):
        load_data("mnist", tmp_path)


def filled(folder, n=24, **how):
    for i in range(n):
        picture(folder / f"{i}.png", (8, 8), **how)


def read(path, **how):
    """One image as it is read, at 8 pixels."""
    ((_, pixels),) = read_images([path], 8, **how)
    return pixels


@pytest.mark.parametrize("reader", ["folder", "captioned"])
def test_a_photograph_stands_upright(reader, tmp_path):
    """EXIF orientation 6: stored lying on its side, red on top when shown."""
    image = Image.new("RGB", (16, 16), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(20):
        image.rotate(90).save(tmp_path / f"{i}.jpg", exif=exif, quality=95)
    lines = [json.dumps({"file_name": f"{i}.jpg", "text": "red above blue"}) for i in range(20)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    if reader == "folder":
        images = load_data("folder", tmp_path, 16).images
    else:
        images = captioned_folder(tmp_path, 16)[1]
    assert (images[:, 0, :6] > 200).all() and (images[:, 2, 10:] > 200).all()


def test_sixteen_bits_become_eight(tmp_path, capsys):
    for value, wanted in ((0, 0), (257, 1), (32768, 128), (65535, 255)):
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "a.png")
        assert (read(tmp_path / "a.png") == wanted).all(), value
    for name, kind in (("b.tif", np.float32), ("c.tif", np.int32)):
        Image.fromarray(np.full((8, 8), 3, kind)).save(tmp_path / name)
        with pytest.raises(mcm.InputError, match="none of the 1 images"):
            read(tmp_path / name)
        assert "nothing says which is white" in "".join(capsys.readouterr())


def test_hidden_folders_are_no_classes(tmp_path, capsys):
    for name in ("cats", "dogs", ".ipynb_checkpoints", "__MACOSX"):
        filled(tmp_path / name, 12)
    filled(tmp_path / "cats" / ".thumbnails", 5)
    picture(tmp_path / "dogs" / "._1.png")
    data = load_data("folder", tmp_path, 8)
    assert data.classes == 2 and len(data.images) + len(data.held_images) == 24
    assert "2 classes: cats 12, dogs 12" in capsys.readouterr().out


def test_each_class_has_an_image_to_learn_from(tmp_path, capsys):
    filled(tmp_path / "many", 100)
    for i in range(8):
        picture(tmp_path / f"one{i}" / "x.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"nothing")
    data = load_data("folder", tmp_path, 8)
    assert data.classes == 9 and set(data.labels.tolist()) == set(range(9))
    assert len(data.images) + len(data.held_images) == 108 and len(data.held_images) >= 1
    assert "9 classes: many 100, one0 1," in capsys.readouterr().out


def test_what_may_have_been_meant_otherwise_is_said(tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("cats", "dogs"):
            filled(tmp_path / "a" / split / name, 6)
    assert load_data("folder", tmp_path / "a", 8).classes == 2
    assert f"point --data-dir at {tmp_path / 'a' / 'train'}" in capsys.readouterr().out
    for splits in (("Training", "Testing"), ("train2017", "val2017"), ("test-set", "train_images")):
        for split in splits:
            filled(tmp_path / splits[0] / split, 11)
        load_data("folder", tmp_path / splits[0], 8)
        first = next(name for name in splits if name.lower().startswith("train"))
        out = capsys.readouterr().out
        assert "look like splits" in out and out.endswith(f"{tmp_path / splits[0] / first}\n")
    for name in ("cats", "dogs"):
        filled(tmp_path / "alone" / "train" / name, 11)
    assert load_data("folder", tmp_path / "alone", 8).classes == 1
    out = capsys.readouterr().out
    assert f"if cats, dogs are the classes, point --data-dir at {tmp_path / 'alone' / 'tr'}" in out
    filled(tmp_path / "b" / "cats", 12)
    filled(tmp_path / "b", 10)
    assert load_data("folder", tmp_path / "b", 8).classes == 2
    out = capsys.readouterr().out
    assert "(in no folder) 10" in out and "10 images lie beside the class folders" in out


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    filled(tmp_path / "elsewhere", 12)
    filled(tmp_path / "data" / "cats", 12)
    (tmp_path / "data" / "dogs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cats" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "itself").symlink_to(tmp_path / "elsewhere")
    data = load_data("folder", tmp_path / "data", 8)
    assert data.classes == 2 and len(data.images) + len(data.held_images) == 24


def test_whatever_a_decoder_raises_and_whatever_a_file_is_called(tmp_path, capfd):
    """Names that are no text, a damaged TIFF (its decoder raises TypeError)."""
    filled(tmp_path, 22)
    strange = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(strange, "wb") as file:
        file.write(b"nothing")
    picture(tmp_path / "whole.tif", (8, 8))
    whole = (tmp_path / "whole.tif").read_bytes()
    rng = np.random.default_rng(0)
    for i in range(30):  # somewhere a byte is another
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        (tmp_path / f"damaged{i}.tif").write_bytes(damaged)
    assert load_data("folder", tmp_path, 8).classes == 1
    out, err = capfd.readouterr()
    assert "caf\\xe9.png" in out + err and "could not be read" in out


def test_any_error_of_a_decoder_skips_its_image(tmp_path, monkeypatch, capsys):
    filled(tmp_path, 21)
    real = Image.open

    def fails(path, *arguments):
        if path.name == "3.png":
            raise TypeError("a decoder's own trouble \udce9")
        return real(path, *arguments)

    monkeypatch.setattr(Image, "open", fails)
    data = load_data("folder", tmp_path, 8)
    assert len(data.images) + len(data.held_images) == 20
    assert "3.png: a decoder's own trouble" in "".join(capsys.readouterr())


def test_other_endings(tmp_path, capsys):
    for end in ("gif", "jfif", "webp", "PNG"):
        for i in range(6):
            picture(tmp_path / f"{i}.{end}", (8, 8))
    (tmp_path / "a.heic").write_bytes(b"?")
    (tmp_path / "notes.txt").write_bytes(b"?")
    data = load_data("folder", tmp_path, 8)
    assert len(data.images) + len(data.held_images) == 24
    out = capsys.readouterr().out
    assert "2 files that cannot be read here (.heic, .txt) were left out" in out


def test_a_folder_of_other_files_says_which(tmp_path):
    (tmp_path / "a.HEIC").write_bytes(b"?")
    with pytest.raises(mcm.InputError, match=r"no images in .*; found \.heic\)"):
        load_data("folder", tmp_path, 8)


def test_names_with_line_ends_stay_on_one_line(tmp_path, capsys):
    for name in ("two\nlines", "\x1b[31mred", "plain"):
        (tmp_path / name).mkdir()
        filled(tmp_path / name, 10)
    assert load_data("folder", tmp_path, 8).classes == 3
    out = capsys.readouterr().out
    assert r"3 classes: \x1b[31mred 10, plain 10, two\nlines 10" in out


def test_transparent_images_are_said_and_their_background_chosen(tmp_path, capsys):
    filled(tmp_path, 21, colour=(0, 255, 0, 0), mode="RGBA")
    picture(tmp_path / "opaque.png", (8, 8), (9, 9, 9))
    data = load_data("folder", tmp_path, 8)
    assert capsys.readouterr().out.count("21 images are transparent: shown on black") == 1
    white = load_data("folder", tmp_path, 8, "white")
    assert "shown on white" in capsys.readouterr().out
    for found, value in ((data, 0), (white, 255)):
        pixels = torch.cat([found.images, found.held_images])[:, 0, 0, 0]
        assert sorted(pixels.tolist()) == sorted([9] + [value] * 21)


def test_fingerprint_tells_data_apart():
    a = load_data("digits", "")
    b = load_data("digits", "")
    assert a.fingerprint() == b.fingerprint()
    b.images[700, 0, 3, 3] ^= 1
    assert a.fingerprint() != b.fingerprint()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_collected_on_disk_is_as_in_memory_and_leaves_nothing(tmp_path, dtype):
    parts = [
        torch.arange(24).reshape(4, 3, 2).to(dtype),
        torch.arange(6).reshape(1, 3, 2).to(dtype).transpose(1, 2).contiguous().transpose(1, 2),
    ]
    kept = cat_on_disk(iter(parts), tmp_path / "new")
    assert (
        kept.dtype == dtype
        and torch.equal(kept, cat_on_disk(iter(parts)))
        and torch.equal(kept[torch.tensor([4, 0])], torch.cat(parts)[[4, 0]])
    )
    assert not list((tmp_path / "new").iterdir())


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(mcm.InputError, match="file cannot hold"):
        cat_on_disk(iter([torch.zeros(2)]), tmp_path / "file")


def test_captioned_pictures_keep_their_captions(tmp_path, capsys):
    with (tmp_path / "metadata.jsonl").open("w") as listing:
        for i in range(20):
            Image.new("RGB", (10, 8), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
            listing.write(json.dumps({"file_name": f"{i}.png", "text": f" picture {i} "}) + "\n")
    (tmp_path / "7.png").write_bytes(b"no picture")
    for folder in (None, tmp_path):
        captions, pictures = captioned_folder(tmp_path, 4, folder)
        assert pictures.shape == (19, 3, 4, 4) and pictures.dtype == torch.uint8
        assert [f"picture {value // 10}" for value in pictures[:, 0, 0, 0].tolist()] == captions
        assert (
            captions != sorted(captions, key=lambda c: int(c.split()[1]))
            and len(set(captions)) == 19
        )
    assert "1 of 20 images could not be read" in capsys.readouterr().out


def test_captioned_folders_hidden_or_linked(tmp_path):
    """As folders of classes: what is hidden is left out, links are followed, loops end."""
    for name in ("data/a", "data/.ipynb_checkpoints", "data/__MACOSX", "elsewhere"):
        picture(tmp_path / name / "x.png")
        line = json.dumps({"file_name": "x.png", "text": f"from {name}"})
        (tmp_path / name / "metadata.jsonl").write_text(line, encoding="utf-8")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    captions, images = captioned_folder(tmp_path / "data", 8)
    assert sorted(captions) == ["from data/a", "from elsewhere"] and len(images) == 2


def listed(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    return folder


@pytest.mark.parametrize(
    "name, text, caption",
    [
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "a cat"}', "a cat"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": ["a cat", "a pet"]}', "a cat"),
        ("metadata.jsonl", '\ufeff{"file_name": "a.png", "text": "a cat"}', "a cat"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "a\u2028b"}\r\n', "a\u2028b"),
        ("metadata.csv", 'file_name,text\na.png,"a cat, sitting"\n', "a cat, sitting"),
        ("metadata.csv", 'caption,file_name\n"$5\nor $10",a.png\n', "$5\nor $10"),
    ],
)
def test_captions_as_the_datasets_library_reads_them(tmp_path, name, text, caption, capsys):
    """Here or in a sub-folder, whose file names are seen from there."""
    for place in (tmp_path / "top", tmp_path / "nested" / "train"):
        listed(place, name, text)
    for folder in ("top", "nested"):
        captions, images = captioned_folder(tmp_path / folder, 8)
        assert captions == [caption] and len(images) == 1
    assert ("several captions; the first" in capsys.readouterr().out) == ("a pet" in text)


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("metadata.jsonl", '{"image": "a.png", "text": "a cat"}', "line 1: .*; it has image, text"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": []}', "it has file_name, text"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 5}', "it has file_name, text"),
        ("metadata.jsonl", "a.png a cat", "line 1: .*; it cannot be read"),
        ("metadata.csv", "file;text\na.png;a cat\n", "line 2: .*; it has file;text"),
        ("captions.json", "{}", r"no metadata.jsonl or metadata.csv .*a.png.*captions.json"),
    ],
)
def test_captions_that_are_not_there_are_named(tmp_path, name, text, says):
    with pytest.raises(mcm.InputError, match=says):
        captioned_folder(listed(tmp_path / "data", name, text), 8)


def test_only_a_line_feed_ends_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\u2028on a mat\r\n\n a dog \n".encode())
    assert read_lines(tmp_path / "prompts.txt") == [(1, "a cat\u2028on a mat"), (3, "a dog")]
