"""Two processes on the CPU, started by torchrun as a user would, against one."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mcm
from mcm.lab import distributed
from mcm.lab.run import DenoiserRun, Training

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    "--data digits --device cpu --channels 16 --teacher-iterations 12 --student-iterations 8 "
    "--steps 2 --samples 131 --classifier-iterations 20 --batch 32 --save-every 4 --lr 1e-3"
)


def run(processes: int, out: Path, *more: str) -> subprocess.CompletedProcess:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes > 1
        else []
    )
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "run_cifar.py"),
        *RUN.split(),
        "--out",
        str(out),
        *more,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = {}
    for processes in (1, 2):
        found[processes] = tmp_path_factory.mktemp(f"on-{processes}") / "run"
        done = run(processes, found[processes], "--tensorboard")
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("the network has") == 1  # one of them talks
    return found


def apart(a: Path, b: Path, name: str) -> float:
    """How far the weights of two runs' models lie apart, over their size."""
    one, two = (mcm.load(folder / f"{name}.safetensors").network.state_dict() for folder in (a, b))
    return (
        torch.cat([(one[k] - two[k]).flatten() for k in one]).norm()
        / torch.cat([v.flatten() for v in one.values()]).norm()
    ).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "cd-2"])
def test_two_processes_train_what_one_does(runs, name):
    """To rounding, in weights and losses."""
    assert apart(runs[1], runs[2], name) < 1e-4
    logs = [
        [json.loads(line) for line in (runs[n] / "log.jsonl").read_text().splitlines()]
        for n in (1, 2)
    ]
    assert [(a["model"], a["step"]) for a in logs[0]] == [(b["model"], b["step"]) for b in logs[1]]
    for a, b in zip(*logs):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a[
            "gradient_norm"
        ] == pytest.approx(b["gradient_norm"], rel=1e-3)
        assert [x is None for x in a["loss_by_t"]] == [x is None for x in b["loss_by_t"]]


@pytest.mark.slow
def test_two_processes_train_in_bfloat16_what_one_does(runs, tmp_path):
    """To the rounding of gradients, which bfloat16 averages: nearer than it is to float32."""
    for processes in (1, 2):
        done = run(processes, tmp_path / str(processes), "--precision", "bf16")
        assert done.returncode == 0, done.stderr[-2000:]
    for name in ("teacher", "cd-2"):
        between = apart(tmp_path / "1", tmp_path / "2", name)
        assert 0 < between < 0.5 * apart(tmp_path / "1", runs[1], name) + 2e-3, name


@pytest.mark.slow
def test_two_processes_measure_what_one_does(runs):
    one, two = (json.loads((runs[n] / "results.json").read_text())["rows"] for n in (1, 2))
    for a, b in zip(one, two):
        assert (a["model"], a["steps"]) == (b["model"], b["steps"]) and a[
            "frechet"
        ] == pytest.approx(b["frechet"], rel=1e-2)
        assert a["rmse_to_teacher"] == pytest.approx(
            b["rmse_to_teacher"], rel=1e-2, abs=1e-6
        )  # sees the order of images
        assert a["class_accuracy"] == pytest.approx(
            b["class_accuracy"], abs=0.02
        )  # and of predictions


@pytest.mark.slow
def test_two_processes_draw_the_same_images(runs):
    one, two = (np.asarray(Image.open(runs[n] / "samples.png"), np.int16) for n in (1, 2))
    assert one.shape == two.shape and one.std() > 10 and np.abs(one - two).max() <= 2


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(mcm.InputError, match="2 processes, 1 GPUs: use --nproc_per_node 1"):
        distributed.start(None)


def test_dropout_differs_between_processes_and_agrees_between_the_two_calls_of_a_step(monkeypatch):
    masks, network = {}, distributed.Parallel(torch.nn.Dropout(0.5), torch.device("cpu"))
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        masks[rank] = network(torch.ones(100)) > 0
        assert torch.equal(
            network(torch.ones(100)) > 0, masks[rank]
        )  # nothing was drawn in between
        after = torch.rand(3)
        assert not torch.equal(network(torch.ones(100)) > 0, masks[rank])
    assert not torch.equal(masks[0], masks[1])
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), after)


@pytest.mark.slow
def test_a_run_that_two_began_is_ended_by_one(runs, tmp_path):
    out = tmp_path / "run"
    done = run(2, out, "--student-iterations", "4")
    assert done.returncode == 0, done.stderr[-2000:]
    for end in (
        "",
        ".state",
        ".state.previous",
    ):  # as a kill after the teacher's step 8 would leave it
        path = out / f"teacher{end}.safetensors"
        path.unlink(missing_ok=True) if end != ".state.previous" else path.rename(
            out / "teacher.state.safetensors"
        )
    for path in out.glob("cd-2*"):
        path.unlink()
    before = (out / "log.jsonl").read_text().splitlines()[:2]
    assert [(json.loads(line)["model"], json.loads(line)["step"]) for line in before] == [
        ("teacher", 4),
        ("teacher", 8),
    ]
    assert run(1, out, "--resume").returncode == 0
    assert (out / "log.jsonl").read_text().splitlines()[
        :2
    ] == before  # with their seconds: these steps were not made again
    assert apart(runs[1], out, "teacher") < 1e-4


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    done = run(2, tmp_path / "run", "--batch", "33")
    assert done.returncode != 0 and "need a batch of a multiple of 2, not 33" in done.stderr


def test_uneven_batches_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    denoiser = mcm.Denoiser(mcm.UNet(8, 1, 8, (1,), 1), mcm.CosineSchedule())
    with pytest.raises(
        mcm.InputError, match="2 processes .* need a batch of a multiple of 2, not 33"
    ):
        DenoiserRun("m", denoiser, Training(1, batch=33), tmp_path)


def test_dropout_follows_the_random_state_of_the_device(monkeypatch):
    """On a GPU times and noise are drawn there: the CPU's state is one and the same for all parts
    of a step, which would share their masks.
    """
    states = iter([1, 1, 2])
    seeds = []
    state = lambda device: torch.tensor([next(states)], dtype=torch.uint8)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_rng_state", state)
    monkeypatch.setattr(distributed, "restored_randomness", lambda device: nullcontext())
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    parallel = distributed.Parallel(torch.nn.Identity(), torch.device("cuda", 0))
    for _ in range(3):
        parallel(torch.zeros(1))
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.slow
def test_the_first_process_alone_writes_for_tensorboard(runs):
    pytest.importorskip("tensorboard")
    for model in ("teacher", "cd-2"):
        files = list((runs[2] / "tensorboard" / model).iterdir())
        assert len(files) == 1 and files[0].stat().st_size > 0
