"""The script from end to end, as a user starts it."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.utils import save_image

import mcm
from mcm.denoiser import Guided
from mcm.lab import options, plots
from mcm.lab.data import load_data, to_float

ROOT = Path(__file__).resolve().parents[2]
QUICK = (
    "--data digits --device cpu --channels 16 --teacher-iterations 6 --student-iterations 4 "
    "--samples 128 --classifier-iterations 20 --batch 32 --save-every 3"
)


sys.path.insert(0, str(ROOT))
import run_cifar  # noqa: E402


def run(*arguments):
    """-> what it printed. In this process, to be quick; a warning is a failure."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run_cifar.run([str(a) for a in arguments]) == 0
    return printed.getvalue()


@pytest.fixture
def refused(capsys):
    """Exit code 2 and one paragraph that says what was wrong. In this process, to be quick; any
    other exception is a failure.
    """

    def check(*arguments, says):
        assert run_cifar.run([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        assert says in error and "Traceback" not in error, error

    return check


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A run of seconds, whose models know nothing: for everything but quality."""
    out = tmp_path_factory.mktemp("quick") / "run"
    run(*QUICK.split(), "--steps", 1, 2, "--out", out)
    return out


@pytest.mark.slow
def test_digits_students_beat_their_teacher_by_far(tmp_path):
    """1- and 2-step students need less than half the teacher's distance at equal steps. In the run
    that MCM_DIGITS_RUN names, as CI has made one already, or in a smaller one, made here.
    """
    out = Path(os.environ.get("MCM_DIGITS_RUN", tmp_path / "digits"))
    if not out.is_dir():
        budget = "--channels 32 --teacher-iterations 900 --student-iterations 550 --samples 1000"
        run("--data", "digits", "--out", out, "--steps", 1, 2, *budget.split())
    rows = json.loads((out / "results.json").read_text())["rows"]
    teacher = {r["steps"]: r for r in rows if r["model"] == "teacher" and r["sampler"] == "ddim"}
    students = {r["steps"]: r for r in rows if r["model"] == "student"}
    for K in (1, 2):
        assert students[K]["frechet"] < 0.5 * teacher[K]["frechet"]
        assert (
            students[K]["rmse_to_teacher"] < 0.6 * teacher[K]["rmse_to_teacher"]
        )  # the same noise gives the same image
        assert students[K]["recall"] > teacher[K]["recall"] + 0.3
        assert students[K]["class_accuracy"] > 0.9


@pytest.mark.slow
def test_what_out_receives(quick):
    names = {p.name for p in quick.iterdir()}
    pictures = {"samples.png", "quality_vs_steps.png", "training.png"}
    checkpoints = {
        f"{m}{end}.safetensors"
        for m in ("teacher", "cd-1", "cd-2")
        for end in ("", ".state", ".state.previous")
    }
    assert (
        names
        == {"results.json", "results.md", "log.jsonl", "run.json", ".lock", "rows.json", "previews"}
        | {"explorer.html"}
        | pictures
        | checkpoints
    )
    for picture in [*(quick / name for name in pictures), *(quick / "previews").iterdir()]:
        assert np.array(Image.open(picture)).std() > 10
    assert {p.name for p in (quick / "previews").iterdir()} >= {
        "teacher-000003.png",
        "teacher-000006.png",
        "cd-2-000004.png",
    }
    assert (
        mcm.load(quick / "cd-2.safetensors").student_steps == 2
        and mcm.load(quick / "teacher.safetensors").student_steps is None
    )


@pytest.mark.slow
def test_results_json_has_the_promised_shape(quick):
    results = json.loads((quick / "results.json").read_text())
    assert results["data"] == "digits" and results["seed"] == 0 and results["device"] == "cpu"
    assert (
        results["command"].startswith("python run_cifar.py --data digits")
        and results["processes"] == 1
        and str(quick.parent) not in json.dumps(results)
    )
    metric = {
        k: results["metric"][k] for k in ("name", "dim", "n_generated", "n_reference", "reference")
    }
    assert metric == {
        "name": "frechet",
        "dim": 64,
        "n_generated": 128,
        "n_reference": 1500,
        "reference": "train",
    }
    assert results["reference_floor"]["n"] == 750 and results["reference_floor"]["frechet"] > 0
    columns = {
        "model",
        "sampler",
        "steps",
        "nfe",
        "frechet",
        "kernel_distance",
        "precision",
        "recall",
        "rmse_to_teacher",
        "class_accuracy",
        "seconds_per_image",
    }
    assert [(r["model"], r["sampler"], r["steps"]) for r in results["rows"]] == (
        [("teacher", "ddim", k) for k in (1, 2, 4, 8, 16, 32, 64)]
        + [("teacher", "addim", k) for k in (2, 4, 8, 16)]
        + [("student", "ddim", k) for k in (1, 2)]
    )
    for row in results["rows"]:
        assert (
            set(row) == columns | ({"recipe"} if row["model"] == "student" else set())
            and row["nfe"] == row["steps"]
        )
    assert results["rows"][6]["rmse_to_teacher"] == 0 and results["rows"][-1]["recipe"] == "mcm-cd"
    assert set(results["seconds"]) == {"teacher", "students", "evaluation", "total"} and set(
        results["seconds"]["students"]
    ) == {"1", "2"}


@pytest.mark.parametrize(
    "command, kept",
    [
        (["--out=/a/b", "--data-dir", "/c/d e"], "--out=b --data-dir 'd e'"),
        (["--lr", "1e-3", "--teacher", "x/y.safetensors"], "--lr 1e-3 --teacher y.safetensors"),
    ],
)
def test_the_recorded_command_names_no_folders(command, kept):
    where = options.provenance("run_cifar.py", command, torch.device("cpu"), [])
    assert where["command"] == "python run_cifar.py " + kept


def copied(quick, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(quick, out)
    for cache in quick.parent.glob("features-*"):
        shutil.copy(cache, tmp_path)
    return out


@pytest.mark.slow
def test_fid_is_named_only_with_inception(tmp_path, monkeypatch, capsys):
    """With a stand-in for the network, which has 100 MB of weights: its name, its default of 50,000
    samples, its cache of the real features.
    """
    calls = []

    class Inception(run_cifar.metrics.Foreign):
        DIM, name = 64, "a stand-in"

        def of_pixels(self, pixels):
            calls.append(len(pixels))
            assert pixels.shape[1:] == (3, 8, 8) and pixels.equal(pixels.round().clamp(0, 255))
            return pixels[:, 0].flatten(1) / 127.5 - 1

    monkeypatch.setitem(run_cifar.metrics.FOREIGN, "inception", Inception)
    assert run_cifar.parse(["--data", "digits", "--features", "inception"]).samples == 50_000
    for more, named in (
        ("", True),
        ("--samples 49999", False),
        ("--image-size 16", False),
        ("--data imagenet64 --samples 60000", True),
    ):
        assert (
            run_cifar.is_fid(run_cifar.parse(["--features", "inception", *more.split()])) == named
        )
    assert not run_cifar.is_fid(run_cifar.parse(["--samples", "50000"]))
    monkeypatch.setattr(run_cifar, "FID_SAMPLES", 128)
    arguments = [
        *QUICK.split(),
        "--features",
        "inception",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    assert run_cifar.run(arguments) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (
        results["metric"]["name"] == "fid"
        and "| FID | KID |" in (tmp_path / "run" / "results.md").read_text()
    )
    data = load_data("digits")
    kept = load_file(next(tmp_path.glob("inception-digits-*.safetensors")))["features"]
    torch.testing.assert_close(kept, to_float(data.images).flatten(1), atol=1e-6, rtol=0)
    seen = sum(calls)
    assert run_cifar.run([*arguments, "--resume"]) == 0 and sum(calls) == seen  # all was kept
    monkeypatch.setitem(run_cifar.metrics.FOREIGN, "efficientnet-lite0", Inception)
    other = ["efficientnet-lite0" if a == "inception" else a for a in arguments]
    assert (
        run_cifar.parse(["--data", "digits", "--features", "efficientnet-lite0"]).samples == 10_000
    )
    assert run_cifar.run([*other, "--resume"]) == 0
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["metric"]["name"] == "frechet" and again["metric"]["features"] == "a stand-in"
    assert all(row["kernel_distance"] is not None for row in again["rows"])
    assert "FID" not in (
        "".join(run_cifar.head(results | {"metric": results["metric"] | {"name": "frechet"}}))
    ).replace("not FID", "")


@pytest.mark.slow
def test_resume_repeats_nothing_and_adds_what_is_new(quick, tmp_path):
    out = copied(quick, tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    log = (out / "log.jsonl").read_text()
    run(*QUICK.split(), "--steps", 1, 2, 4, "--out", out, "--resume")
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    added = (out / "log.jsonl").read_text().removeprefix(log)
    assert added and all(json.loads(line)["model"] == "cd-4" for line in added.splitlines())
    old, new = (json.loads((d / "results.json").read_text())["rows"] for d in (quick, out))
    assert new[:-1] == old and new[-1]["steps"] == 4
    run(*QUICK.split(), "--method", "ct", "--steps", 2, "--out", out, "--resume")
    assert [r.get("recipe") for r in json.loads((out / "results.json").read_text())["rows"]][
        -4:
    ] == ["mcm-cd"] * 3 + ["mcm-ct"]
    # a student trained again is measured again, the others are not
    for end in ("", ".state"):
        (out / f"cd-2{end}.safetensors").unlink()
    run(
        *QUICK.replace("--student-iterations 4", "--student-iterations 8").split(),
        "--steps",
        2,
        "--out",
        out,
        "--resume",
    )
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [r["frechet"] == o["frechet"] for r, o in zip(rows[-4:-1], new[-3:])] == [
        True,
        False,
        True,
    ]


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing():
    """The short version of a benchmark, which kills a larger run 30 times."""
    shorter = "--channels 8 --teacher-iterations 24 --student-iterations 12 --samples 128"
    shorter = [*shorter.split(), "--classifier-iterations", "5"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "2", *shorter],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        done.returncode == 0
        and done.stdout.count("identical") >= 2
        and done.stdout.splitlines()[-1].endswith("0 runs that ended differently")
    ), done.stdout + done.stderr


@pytest.mark.slow
def test_an_interrupted_run_ends_like_an_undisturbed_one(quick, tmp_path):
    """Stopped for real in the middle of a student by Ctrl-C, which saves: the resumed weights are
    the same. (Kills: above.)
    """
    arguments = (
        QUICK.replace("--student-iterations 4", "--student-iterations 300")
        .replace("--save-every 3", "--save-every 40")
        .split()
    )
    arguments += ["--steps", "2", "--teacher", str(quick / "teacher.safetensors")]
    finals = []
    for name in ("whole", "broken"):
        out = copied(quick, tmp_path / name)
        shutil.rmtree(out)
        command = [sys.executable, str(ROOT / "run_cifar.py"), *arguments, "--out", str(out)]
        if name == "broken":
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while not (out / "cd-2.state.safetensors").exists():
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert 40 <= mcm.load(out / "cd-2.safetensors").metadata["step"] < 300
            command.append("--resume")
        assert subprocess.run(command, capture_output=True).returncode == 0
        finals.append(mcm.load(out / "cd-2.safetensors").network.state_dict())
        assert len(
            {json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()}
        ) == len((out / "log.jsonl").read_text().splitlines())
    assert all(torch.equal(finals[0][k], finals[1][k]) for k in finals[0])


@pytest.mark.slow
def test_sample_draws_a_grid_in_the_steps_the_checkpoint_knows(quick, tmp_path):
    assert "9 images, 2 steps" in run(
        "--sample", quick / "cd-2.safetensors", "--n", 9, "--out", tmp_path
    )
    assert Image.open(tmp_path / "cd-2-2-steps.png").size == (3 * 98 + 2, 3 * 98 + 2)
    assert "64 steps" in run("--sample", quick / "teacher.safetensors", "--n", 4, "--out", tmp_path)


@pytest.mark.slow
def test_a_given_teacher_and_guidance(quick, tmp_path):
    out = tmp_path / "guided"
    run(
        *QUICK.split(),
        "--teacher",
        quick / "teacher.safetensors",
        "--guidance",
        2,
        "--steps",
        4,
        "--x-var",
        "mse",
        "--out",
        out,
    )
    results = json.loads((out / "results.json").read_text())
    assert not (out / "teacher.safetensors").exists() and results["seconds"]["teacher"] is None
    assert {r["nfe"] // r["steps"] for r in results["rows"] if r["model"] == "teacher"} == {2}
    assert results["rows"][-1]["nfe"] == 4
    assert "quick" not in results["command"] and "teacher.safetensors" in results["command"]


@pytest.mark.slow
@pytest.mark.parametrize("init", ["teacher", "random"])
def test_where_students_start(quick, tmp_path, init):
    """With a learning rate of nearly nothing a student ends where it starts: at the teacher's
    weights, or where the teacher began.
    """
    teacher = mcm.load(quick / "teacher.safetensors").network
    torch.manual_seed(0)
    expected = (teacher if init == "teacher" else mcm.UNet(**teacher.arguments)).state_dict()
    run(
        *QUICK.split(),
        "--teacher",
        quick / "teacher.safetensors",
        "--steps",
        2,
        "--init",
        init,
        "--student-lr",
        1e-12,
        "--out",
        tmp_path / "run",
    )
    torch.testing.assert_close(
        mcm.load(tmp_path / "run" / "cd-2.safetensors").network.state_dict(), expected
    )
    settings = json.loads((tmp_path / "run" / "results.json").read_text())["settings"]
    assert settings["init"] == init and settings["precision"] == "fp32"


@pytest.mark.slow
def test_fewer_pixels_and_another_schedule(tmp_path):
    """Digits averaged down to 4x4, with the interpolated cosine schedule that the paper has for
    ImageNet 64.
    """
    run(
        *QUICK.split(),
        "--image-size",
        4,
        "--noise-scale",
        0.5,
        1,
        "--steps",
        2,
        "--out",
        tmp_path / "run",
    )
    student = mcm.load(tmp_path / "run" / "cd-2.safetensors")
    assert student.network.arguments["image_size"] == 4
    assert (
        student.schedule
        == mcm.CosineSchedule.interpolated(4, 2, 4)
        == mcm.CosineSchedule.interpolated(64, 32, 64)
    )


@pytest.mark.parametrize(
    "data, preset, millions",
    [
        ("cifar10", "small", 3.8),
        ("cifar10", "base", 35.5),
        ("cifar10", "tiny", 1.5),
        ("imagenet64", "base", 65.2),
    ],
)
def test_presets_have_the_size_they_say(data, preset, millions):
    config = run_cifar.parse(["--data", data, "--preset", preset])
    with torch.device("meta"):
        network = run_cifar.unet(config, 3, 10 if data == "cifar10" else 1000)
    counted = sum(p.numel() for p in network.parameters()) / 1e6
    assert counted == pytest.approx(millions, abs=0.06)
    assert run_cifar.parameters(config) == f"{millions} M parameters"


def test_an_apple_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert options.pick_device("mps") == torch.device("mps")
    assert options.pick_device(None).type in ("cpu", "cuda")  # not by itself: never tried on one
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(mcm.InputError, match="no --device mps on this machine"):
        options.pick_device("mps")


def test_help_and_a_run_say_the_same_size(capsys):
    """Computed, not typed."""
    for (data, preset), (cost, config) in run_cifar.PRESETS.items():
        run_cifar.introduce(run_cifar.parse(["--data", data, "--preset", preset]))
        told = capsys.readouterr().out.splitlines()[0]
        assert not re.search(r"\d M\b", cost)
        size = run_cifar.parameters(replace(config, data=data))
        assert told == f"{data}, preset {preset}: {size}, {cost}"
    with pytest.raises(SystemExit):
        run_cifar.parse(["--help"])
    assert "--preset small: 0.8 M parameters, 16x16" in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(150):
        place = tmp_path / "pictures" / f"class{i % 2}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(place)
    arguments = QUICK.replace("digits", "folder").split()
    run(
        *arguments,
        "--preset",
        "small",
        "--data-dir",
        tmp_path / "pictures",
        "--image-size",
        16,
        "--steps",
        2,
        "--out",
        tmp_path / "run",
    )
    assert (
        json.loads((tmp_path / "run" / "results.json").read_text())["metric"]["n_reference"] == 135
    )
    assert mcm.load(tmp_path / "run" / "cd-2.safetensors").network.arguments["classes"] == 2


def test_help_reads_like_documentation(capsys):
    with pytest.raises(SystemExit):
        run_cifar.run(["--help"])
    text = capsys.readouterr().out
    for word in (
        "--data",
        "--method",
        "--resume",
        "default: cifar10",
        "--data digits --preset long",
        "--data cifar10 --preset base",
        "student_iterations",
        "minutes on 2 CPU cores",
    ):
        assert word in text


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--data mnist", "unknown data set 'mnist': choose digits, cifar10, imagenet64, folder"),
        ("--data digits --preset huge", "no preset 'huge' for digits: choose default, long, tiny"),
        ("--data cifar10 --data-dir nowhere-at-all", "no CIFAR-10 under nowhere-at-all"),
        ("--data folder --data-dir nowhere-at-all", "nowhere-at-all is not a folder"),
        (
            "--data imagenet64 --data-dir nowhere-at-all",
            "no train_data_batch_*.npz in nowhere-at-all",
        ),
        ("--data digits --multipliers 1 1 1 1 1", "image size 8 is not divisible by 16"),
        ("--data digits --steps 0", "at least 1, not 0"),
        (
            "--data digits --steps 200",
            "so many sampling steps needs as fine a grid: --grid 4 200",
        ),
        ("--data digits --steps 4 4", "names a student twice"),
        ("--data digits --student-iterations 5 6", "one for each of --steps"),
        ("--data digits --batch 0", "--batch must be positive"),
        (
            "--data digits --image-size 16",
            "8 pixels cannot be averaged down to 16: choose 8, 4 or 2",
        ),
        ("--data digits --noise-scale 0 1", "--noise-scale must be positive, not 0.0 1.0"),
        ("--data digits --channels -8", "channels must be a positive multiple of 8, not -8"),
        ("--data digits --dropout 2", "dropout in [0, 1)"),
        ("--data digits --seed -1", "--seed must be at least 0"),
        ("--data digits --student-ema 1", "--student-ema must be at least 0 and below 1, not 1.0"),
        ("--data digits --grid 64 32", "--grid must be positive and not fall"),
        ("--data digits --method ct --guidance 2", "which --method ct does not ask"),
        ("--data digits --samples 10", "too few"),
        ("--data digits --guidance 2 --label-dropout 0", "trained with --label-dropout"),
        ("--sample pretrained:digits-4 --guidance 2", "a student has its own within its weights"),
        (
            "--data digits --teacher pretrained:digits-teacher --channels 8",
            "--channels: the students of --teacher have its network, with 32, not 8",
        ),
        (
            "--data digits --teacher pretrained:digits-teacher --noise-scale 0.5 1",
            "--noise-scale: the students of --teacher have its network, with (1.0, 1.0)",
        ),
        ("--data digits --teacher missing.safetensors", "missing.safetensors: no such checkpoint"),
        ("--sample missing.safetensors", "missing.safetensors: no such checkpoint"),
    ],
)
def test_bad_arguments(arguments, says, tmp_path, refused, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("mcm.lab.data.CIFAR10", no_network)
    refused(*arguments.split(), "--out", tmp_path / "run", says=says)


def test_the_exit_code_reaches_the_shell():
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_cifar.py"), "--data", "mnist"],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and done.stderr.startswith("run_cifar.py: error: unknown data set 'mnist'")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there(refused):
    refused(
        *QUICK.replace("--device cpu", "--device cuda").split(),
        says="no --device cuda on this machine, or for this PyTorch: use cpu",
    )


@pytest.mark.parametrize("name, index", [(None, 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_has_its_index(monkeypatch, name, index):
    """ "cuda" alone is a device to most of PyTorch, and an error to some of it."""
    chosen = []

    def set_device(device):
        if torch.device(device).index is None:
            raise ValueError("Expected a torch.device with a specified index or an integer")
        chosen.append(torch.device(device).index)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    assert options.pick_device(name) == torch.device("cuda", index) and chosen == [index]
    for script in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("run_*.py")]:
        text = script.read_text()
        assert "set_device(" not in text and "torch.device(args" not in text, script.name


def test_bad_teachers(quick, tmp_path, refused):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes((quick / "teacher.safetensors").read_bytes()[:3000])
    refused(*QUICK.split(), "--teacher", bad, "--out", tmp_path / "a", says="truncated")
    torch.save({"w": torch.zeros(1)}, tmp_path / "pickle.pt")
    refused(
        *QUICK.split(),
        "--teacher",
        tmp_path / "pickle.pt",
        "--out",
        tmp_path / "a2",
        says="pickles",
    )
    save_file({"w": torch.zeros(1)}, bad)
    refused(
        *QUICK.split(),
        "--teacher",
        bad,
        "--out",
        tmp_path / "b",
        says="not a checkpoint written by mcm.save",
    )
    refused(
        *QUICK.split(),
        "--teacher",
        quick / "teacher.state.safetensors",
        "--out",
        tmp_path / "b2",
        says="a training state or feature classifier, not a model",
    )
    refused(
        *QUICK.split(),
        "--teacher",
        quick / "cd-1.safetensors",
        "--out",
        tmp_path / "c",
        says="'student_steps': 1}, but a teacher for digits has",
    )
    mcm.save(bad, mcm.Denoiser(mcm.UNet(16, 3, 16, (1, 1)), mcm.CosineSchedule()))
    refused(
        *QUICK.split(),
        "--teacher",
        bad,
        "--out",
        tmp_path / "d",
        says="'image_size': 16, 'in_channels': 3, 'classes': 0",
    )


def test_out_that_cannot_be_used(quick, tmp_path, refused):
    refused(
        *QUICK.split(),
        "--out",
        quick,
        says="holds another run's results: continue it with --resume",
    )
    refused(
        *QUICK.split(),
        "--out",
        quick,
        "--resume",
        "--seed",
        3,
        says="holds a run with seed 0, but now it is seed 3",
    )
    refused(
        *QUICK.split(),
        "--out",
        quick,
        "--resume",
        "--c",
        0.5,
        says="holds a run with c 0.001, but now it is c 0.5",
    )
    features = ["--features", tmp_path, "--out", tmp_path / "run"]
    refused(*QUICK.split(), *features, says=f"{tmp_path}: no such checkpoint, as a file")
    (tmp_path / "file").write_text("")
    refused(*QUICK.split(), "--out", tmp_path / "file" / "run", says="cannot be written to")


def test_a_network_that_does_not_fit_into_memory(tmp_path, refused):
    refused(
        *QUICK.split(), "--channels", 800_000, "--out", tmp_path / "run", says="not enough memory"
    )


def test_out_of_memory_on_a_gpu_and_errors_of_our_own(capsys):
    def full(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    assert options.run("run_cifar.py", full, []) == 2
    error = capsys.readouterr().err
    assert "2.00 GiB" in error and "--accumulate" in error and "more\n" not in error

    def wrong(argv):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError):
        options.run("run_cifar.py", wrong, [])


def test_a_diverging_run_says_so(tmp_path, refused):
    arguments = QUICK.replace("--teacher-iterations 6", "--teacher-iterations 60").split()
    refused(
        *arguments, "--lr", "1e30", "--out", tmp_path / "run", says="no longer finite, from step"
    )


def test_pictures_leave_the_users_backend_alone(tmp_path):
    """A notebook that imports the library goes on showing its own figures."""
    code = f"""
import matplotlib, pathlib, torch
matplotlib.use("svg")
from mcm.lab import plots
plots.sample_rows({{"a": torch.zeros(2, 1, 8, 8)}}, pathlib.Path({str(tmp_path)!r}) / "a.png")
assert matplotlib.get_backend() == "svg"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "a.png").stat().st_size > 100


def test_pictures_of_large_images_stay_small(tmp_path):
    """A grid of 1024-pixel images takes megabytes, and captions are text, whatever is in them."""
    rows = {f"row {n}": torch.rand(3, 3, 1024, 1024) for n in range(2)}
    captions = ["$5 or $10", "$$", r"a \frac{ cat"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plots.sample_rows(rows, tmp_path / "grid.png", columns=captions)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400 * 1024  # KiB; it was gigabytes
    with Image.open(tmp_path / "grid.png") as image:
        assert 3 * 256 <= image.width < 1200 and 2 * 256 <= image.height < 800


def test_what_the_loops_hand_on(quick, tmp_path, monkeypatch):
    """The teacher never hears a tenth of the labels; a student's teacher is guided, if asked for;
    the distance of one segment is the squared one.
    """
    assert run_cifar.Config.label_dropout == 0.1
    seen = {"labels": [], "teachers": []}
    diffusion, consistency = mcm.diffusion_loss, mcm.consistency_loss

    def watched_diffusion(model, x, labels, **more):
        seen["labels"].append(labels)
        return diffusion(model, x, labels, **more)

    def watched_consistency(model, x, labels, method, **more):
        seen["teachers"].append((method, more["teacher"]))
        return consistency(model, x, labels, method, **more)

    monkeypatch.setattr(mcm, "diffusion_loss", watched_diffusion)
    monkeypatch.setattr(mcm, "consistency_loss", watched_consistency)
    arguments = QUICK.split() + ["--batch", 128, "--guidance", 2.5, "--steps", 1, 2]
    run(*arguments, "--out", tmp_path / "run")
    dropped = (torch.cat(seen["labels"]) == 10).float().mean().item()
    assert 0.06 < dropped < 0.14  # of 768: four standard errors
    distances = {}
    for method, teacher in seen["teachers"]:
        assert isinstance(teacher, Guided) and teacher.w == 2.5
        distances[method.student_steps] = method.distance
    assert distances == {1: "squared", 2: "huber"}


def test_resuming_with_other_pictures_is_refused(tmp_path, refused):
    data = tmp_path / "data"
    for n in range(40):
        (data / f"{n % 2}").mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 8, 8), data / f"{n % 2}" / f"{n}.png")
    arguments = ["--data", "folder", "--data-dir", data, "--image-size", 8, "--channels", 16]
    arguments += "--samples 128 --classifier-iterations 5 --batch 16 --steps 1 --device cpu".split()
    arguments += "--teacher-iterations 2 --student-iterations 2".split() + ["--out", tmp_path / "o"]
    run(*arguments)
    save_image(torch.zeros(3, 8, 8), data / "0" / "0.png")
    save_image(torch.zeros(3, 8, 8), data / "1" / "1.png")
    save_image(torch.zeros(3, 8, 8), data / "0" / "2.png")
    refused(*arguments, "--resume", says="but now it is images")


@pytest.mark.parametrize("encoding", ["ascii", "cp1251", "cp1252"])
def test_a_terminal_that_lacks_a_letter_does_not_end_a_run(encoding):
    """It would, at the very end, when the table is printed."""
    call = "options.run('x', lambda argv: print('Fr\u00e9chet \u9ed1'), [])"
    code = f"from mcm.lab import options; {call}"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0 and done.stderr == b"" and b"\\u9ed1" in done.stdout
