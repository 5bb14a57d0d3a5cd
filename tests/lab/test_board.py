"""TensorBoard: what is in the log is there too, and a resumed run writes on."""

import io
import json
import sys

import pytest
import torch
from PIL import Image

import mcm
import run_cifar
from mcm.lab.board import Board
from mcm.lab.data import digits
from mcm.lab.run import DenoiserRun, Training

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
DATA = digits()
TINY = "--data digits --steps 2 --channels 32 --multipliers 1 --blocks 1 --attention 4 --batch 8"
TINY += " --teacher-iterations 4 --student-iterations 2 --classifier-iterations 2 --samples 128"


def events(folder):
    found = event_accumulator.EventAccumulator(str(folder), {"images": 0, "scalars": 0})
    return found.Reload()


def test_a_run_is_there_with_its_losses_rates_and_pictures(tmp_path):
    out = tmp_path / "run"
    arguments = [*TINY.split(), "--save-every", "2", "--out", str(out), "--tensorboard"]
    assert run_cifar.run(arguments) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for model in ("teacher", "cd-2"):
        found = events(out / "tensorboard" / model)
        lines = {line["step"]: line for line in log if line["model"] == model}
        for key in ("loss", "gradient_norm", "lr", "images_per_second"):
            values = {event.step: event.value for event in found.Scalars(key)}
            assert values == {s: pytest.approx(line[key], rel=1e-6) for s, line in lines.items()}
        previews = sorted((out / "previews").glob(f"{model}-*.png"))
        shown = found.Images("samples")
        assert [event.step for event in shown] == [int(p.stem[-6:]) for p in previews]
        decoded = Image.open(io.BytesIO(shown[-1].encoded_image_string)).convert("RGB")
        assert decoded.tobytes() == Image.open(previews[-1]).convert("RGB").tobytes()
    assert (
        "loss_by_t/9" in found.Tags()["scalars"] and "loss_by_segment/1" in found.Tags()["scalars"]
    )


def test_what_an_interrupted_run_wrote_too_far_is_hidden(tmp_path):
    before = Board(tmp_path, 1)
    for step in (1, 2, 3):
        before.write({"step": step, "loss": 1.0, "loss_by_t": [None, 1.0]})
    after = Board(tmp_path, 3)
    after.write({"step": 3, "loss": 2.0})
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert "loss_by_t/0" not in found.Tags()["scalars"]  # no loss was seen there


def test_a_resumed_run_writes_on(tmp_path):
    """What was logged after the last state is hidden, and written again."""
    network = mcm.UNet(8, 1, 16, (1,), 1, (), 10)
    settings = Training(12, 16, log_every=2, save_every=5, tensorboard=True)
    for resume, last in ((False, 8), (True, 12)):
        student = mcm.Denoiser(network, mcm.CosineSchedule())
        run = DenoiserRun("teacher", student, settings, tmp_path, resume)
        for step in run:
            for x, labels, t, noise in run.parts(DATA):
                run.backward(mcm.diffusion_loss(run.model, x, labels, t=t, noise=noise))
            run.update()
            if step == last:
                break  # as a crash would
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = events(tmp_path / "tensorboard" / "teacher").Scalars("loss")
    assert [line["step"] for line in log] == [2, 4, 5, 6, 8, 10, 12]
    expected = [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in log]
    assert [(event.step, event.value) for event in found] == expected


def test_without_the_package_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mcm.lab.board.find_spec", lambda name: None)
    out = tmp_path / "run"
    assert run_cifar.run([*TINY.split(), "--out", str(out), "--tensorboard"]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err and not out.exists()
    assert run_cifar.parse([*TINY.split()]).tensorboard is False


def test_without_the_option_the_package_is_not_even_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run_cifar.run([*TINY.split(), "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert torch.is_tensor(mcm.load(tmp_path / "run" / "cd-2.safetensors").network.first.weight)
