import json
import pickle
import resource
import struct
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import mcm
import run_cifar
from mcm.lab import checkpoint
from mcm.lab.checkpoint import close_out, must_be, open_out

COSINE = mcm.CosineSchedule()


@pytest.mark.parametrize(
    "schedule", [COSINE, mcm.CosineSchedule.interpolated(64, 32, 64, clip=15.0)]
)
def test_save_and_load(network, tmp_path, schedule):
    denoiser = mcm.Denoiser(network, schedule, "x", student_steps=4)
    mcm.save(tmp_path / "a.safetensors", denoiser, note={"data": "digits"})
    back = mcm.load(tmp_path / "a.safetensors")
    z, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 1.0]), torch.tensor([0, 2])
    assert torch.equal(back(z, t, y), denoiser(z, t, y))
    assert (
        back.student_steps == 4
        and back.schedule == schedule
        and back.metadata["note"] == {"data": "digits"}
    )
    assert not list(tmp_path.glob("*.partial"))


def test_save_and_load_a_discrete_schedule(network, tmp_path):
    schedule = mcm.DiscreteSchedule(torch.linspace(0.999, 0.01, 10))
    mcm.save(tmp_path / "a.safetensors", mcm.Denoiser(network, schedule, "epsilon"))
    assert torch.equal(
        mcm.load(tmp_path / "a.safetensors").schedule.alphas_cumprod, schedule.alphas_cumprod
    )


def test_bad_checkpoints_are_explained(network, tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    mcm.save(good, mcm.Denoiser(network, COSINE))
    data = good.read_bytes()

    def refused(content: bytes, message: str):
        bad.write_bytes(content)
        with pytest.raises(mcm.InputError, match=message):
            mcm.load(bad)

    refused(data[: len(data) // 2], "truncated")
    refused(data[:6], "truncated")
    refused(pickle.dumps({"weights": [1, 2, 3]}), "pickles .* are not loaded")
    for text in ("[" * 100_000, "1" * 5000, "5", "{"):  # of the header's JSON
        save_file({"w": torch.zeros(2)}, bad, {"format": "mcm-1", "mcm": text})
        refused(bad.read_bytes(), "not a readable checkpoint")
    with pytest.raises(mcm.InputError, match="no such checkpoint"):
        mcm.load(tmp_path / "missing.safetensors")
    save_file({"w": torch.zeros(2)}, bad)
    with pytest.raises(mcm.InputError, match="not a checkpoint written by mcm.save"):
        mcm.load(bad)


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 32},
        {"channels": 2**20},
        {"blocks": 10**9},
        {"multipliers": [1] * 10**6},
        {"multipliers": []},
        {"classes": 10**12},
        {"image_size": 2**30},
        {"channels": "64"},
        {"blocks": None},
        {"in_channels": -1},
        {"student_steps": 10**15},
        {"prediction": "eval"},
        {"schedule": {"kind": "os.system"}},
        {"schedule": {"kind": "cosine", "clip": "x"}},
    ],
)
def test_a_tampered_header_is_refused_before_memory_is_taken(network, tmp_path, change):
    path = tmp_path / "a.safetensors"
    mcm.save(path, mcm.Denoiser(network, COSINE))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["mcm"])
    for key, value in change.items():
        (metadata["network"] if key in metadata["network"] else metadata)[key] = value
    header["__metadata__"]["mcm"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(mcm.InputError, match="do not fit|prediction must be"):
        mcm.load(path)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
        and time.perf_counter() - began < 5
    )  # kB, s


def test_a_torch_pickle_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "exploded").touch, ()

    torch.save({"x": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(mcm.InputError, match="pickles"):
        mcm.load(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    """Also another process's; what a run was begun with is compared, and may be added to."""
    out = tmp_path / "out"
    open_out(out, {"seed": 1, "steps": (1, 2)}, resume=False)
    try:
        code = f"""
from pathlib import Path
from mcm.lab.checkpoint import open_out
open_out(Path({str(out)!r}), {{"seed": 1}}, True)
"""
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another run is writing to" in other.stderr and "--resume" not in other.stderr
        (out / "log.jsonl").touch()  # it has begun
    finally:
        close_out()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0  # and it may crash
    open_out(out, {"seed": 1, "steps": [1, 2]}, resume=True)
    close_out()
    must_be(out, images="abc")
    with pytest.raises(mcm.InputError, match="images abc, but now it is images abd"):
        must_be(out, images="abd")
    with pytest.raises(mcm.InputError, match="seed 1, but now it is seed 2"):
        open_out(out, {"seed": 2}, resume=True)
    close_out()


def test_a_run_that_left_nothing_binds_nobody(tmp_path):
    """Told something wrong, it is begun again with what is right."""
    for seed in (1, 2):
        open_out(tmp_path, {"seed": seed}, resume=False)
        close_out()
    (tmp_path / "teacher.state.safetensors").touch()
    for resume, says in ((True, "seed 2, but now it is seed 3"), (False, "another run's results")):
        with pytest.raises(mcm.InputError, match=says):
            open_out(tmp_path, {"seed": 3}, resume)
        close_out()


def test_weights_that_are_there_already(tmp_path, monkeypatch, capsys):
    student = mcm.load("pretrained:digits-4")
    file = checkpoint.WEIGHTS / "digits" / "cd-4.safetensors"
    for a, b in zip(student.state_dict().values(), mcm.load(file).state_dict().values()):
        assert torch.equal(a, b)
    assert (
        student.student_steps == 4 and mcm.load("pretrained:digits-teacher").student_steps is None
    )
    with pytest.raises(mcm.InputError, match="these are: .*cifar10-small-4.*digits-teacher"):
        mcm.load("pretrained:cifar100")
    monkeypatch.chdir(tmp_path)
    assert run_cifar.run(["--sample", "pretrained:digits-2", "--n", "4"]) == 0
    assert (tmp_path / "runs/samples/digits-2-2-steps.png").is_file()
    config = run_cifar.parse(["--data", "digits", "--teacher", "pretrained:digits-teacher"])
    assert config.teacher == checkpoint.WEIGHTS / "digits" / "teacher.safetensors"
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    with pytest.raises(mcm.InputError, match="none, as they are in the repository"):
        mcm.load("pretrained:digits-4")


@pytest.mark.parametrize("name, steps", [("1", None), ("4", None), ("teacher", 8)])
def test_cifar10s_weights_draw_images(name, steps):
    """Not noise: neighbouring dots are alike."""
    model = mcm.load(f"pretrained:cifar10-small-{name}")
    images = mcm.sample(model, torch.randn(4, 3, 32, 32), steps, cond=torch.arange(4))
    assert images.diff(dim=3).square().mean() < 0.2 * images.var()


def test_another_network_than_ours_is_refused(tmp_path):
    other = mcm.Denoiser(torch.nn.Linear(2, 2), mcm.CosineSchedule())
    with pytest.raises(mcm.InputError, match="knows mcm.UNet only: of a Linear torch.save"):
        mcm.save(tmp_path / "x.safetensors", other)
