"""ONNX: the file alone gives the images that torch gives."""

import pytest
import torch

import mcm
from mcm.lab import export

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


# 2.6's exporter has no rule for one of the UNet's operations, and says so
EXPORTS = pytest.mark.skipif(torch.__version__ < (2, 7), reason="PyTorch 2.6's exporter fails")


def denoiser(K, classes=0, channels=1, schedule=None, prediction="v"):
    network = mcm.UNet(8, channels, 32, (1, 2), 1, (8,), classes)
    for weights in network.parameters():  # many begin at zero
        torch.nn.init.normal_(weights, std=0.1)
    schedule = schedule or mcm.CosineSchedule()
    return mcm.Denoiser(network, schedule, prediction, student_steps=K).eval()


def outputs(path, **inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == set(inputs)
    found = session.run(["image"], {k: v.numpy() for k, v in inputs.items()})
    return torch.from_numpy(found[0])


@EXPORTS
@pytest.mark.slow
def test_a_student_with_all_its_steps(tmp_path):
    """Written and read as a user does, and run at other numbers of images than it was traced at."""
    student = denoiser(3, classes=10)
    mcm.save(tmp_path / "student.safetensors", student)
    path = tmp_path / "new" / "student.onnx"
    assert export.main([str(tmp_path / "student.safetensors"), str(path)]) == 0
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # one file, weights included
    for n in (1, 5):
        z, labels = torch.randn(n, 1, 8, 8), torch.arange(n) % 10
        expected = mcm.sample(student, z, cond=labels)
        found = outputs(path, **{"noise": z, "class": labels})
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert (expected - mcm.sample(student, z, cond=labels.flip(0))).abs().max() > 1e-2 or n == 1
        with pytest.warns(UserWarning):
            assert (expected - mcm.sample(student, z, 1, labels)).abs().max() > 1e-2


@EXPORTS
@pytest.mark.slow
def test_a_diffusion_model_is_told_its_steps(tmp_path, capsys):
    mcm.save(tmp_path / "teacher.safetensors", teacher := denoiser(None, channels=3))
    arguments = [str(tmp_path / "teacher.safetensors"), str(tmp_path / "teacher.onnx")]
    assert export.main(arguments) == 2
    assert "pass steps" in capsys.readouterr().err
    assert export.main([*arguments, "--steps", "2"]) == 0
    z = torch.randn(4, 3, 8, 8)
    found = outputs(tmp_path / "teacher.onnx", noise=z)
    torch.testing.assert_close(found, mcm.sample(teacher, z, 2), atol=1e-4, rtol=0)


@EXPORTS
def test_the_model_stays_as_it_was(tmp_path):
    """In training mode, and with a schedule that goes on working: its table is kept once copied."""
    schedule = mcm.DiscreteSchedule.scaled_linear()
    student = denoiser(1, schedule=schedule, prediction="epsilon").train()
    z = torch.randn(2, 1, 8, 8)
    before = mcm.sample(student, z)
    export.export(student, tmp_path / "x.onnx")
    assert student.training
    torch.testing.assert_close(mcm.sample(student, z), before)
    torch.testing.assert_close(outputs(tmp_path / "x.onnx", noise=z), before, atol=1e-4, rtol=0)


def test_what_the_exporter_stumbles_over_is_an_input_error(tmp_path, monkeypatch):
    def stumble(*_, **__):
        raise RuntimeError("no rule for addcmul\nand much more")

    monkeypatch.setattr(torch.onnx, "export", stumble)
    with pytest.raises(mcm.InputError, match=r"could not export it \(no rule for addcmul\)"):
        export.export(denoiser(1), tmp_path / "x.onnx")


def test_bad_input(tmp_path, monkeypatch, capsys):
    assert export.main([str(tmp_path / "none.safetensors"), str(tmp_path / "x.onnx")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    mcm.save(tmp_path / "student.safetensors", denoiser(2))
    arguments = [str(tmp_path / "student.safetensors"), str(tmp_path / "x.onnx")]
    assert export.main([*arguments, "--steps", "0"]) == 2
    assert "steps must be at least 1" in capsys.readouterr().err
    assert export.main([arguments[0], str(tmp_path)]) == 2
    assert "is a folder: give a file in it" in capsys.readouterr().err
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(mcm.InputError, match="pip install onnx onnxscript"):
        export.export(denoiser(1), tmp_path / "x.onnx")
