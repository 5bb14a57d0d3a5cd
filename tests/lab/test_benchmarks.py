import argparse
import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import ablations
import budgets
import costs
import features
import gpu
import over_seeds
import presets
import questions
import sdxl_cost
import unet_speed

import run_cifar
from mcm.lab import checkpoint
from mcm.latent.recipes import RECIPES


def test_an_ablation_changes_what_it_says_and_no_more():
    """Variants of a group differ, and each only in its phases or in the fields that its group is
    about.
    """
    for claim, variants in ablations.GROUPS.values():
        assert "arXiv" in claim or "TLCM (v6)" in claim
        assert len({recipe.phases for recipe in variants.values()}) == len(variants)
    progressive, states = ablations.GROUPS["progressive"][1], ablations.GROUPS["states"][1]
    assert [p.method.student_steps for p in progressive["8-4-2"].phases] == [8, 4, 2]
    assert [p.method.student_steps for p in progressive["only-2"].phases] == [2]
    assert states["8-4-2-1"] == progressive["8-4-2-1"]
    data_states = states["data-states"]
    assert {p.states for p in data_states.phases} == {"data"} and data_states.needs_images
    assert [len(recipe.phases) for recipe in ablations.GROUPS["tlcm"][1].values()] == [1, 2, 3, 4]
    phases = {name: recipe.phases[0] for name, recipe in ablations.GROUPS["scott"][1].items()}
    plain = {name: p.method.teacher_eta for name, p in phases.items() if not p.objectives}
    assert plain == {"eta-0": 0.0, "eta-0.2": 0.2, "eta-0.6": 0.6, "er-sde-5": "er5"}
    for name, phase in phases.items():
        assert bool(phase.objectives) == name.endswith("-adversary")


def test_means_and_spreads_over_seeds(tmp_path, capsys):
    """Ratios are taken within a run, to the better undistilled row of equal sampler and cost,
    before they are averaged.
    """
    plain = {"sampler": "renoise", "coverage": 0.5, "recall": 0.5, "alignment": None}
    for seed, scale in enumerate((1.0, 3.0)):
        rows = [
            plain | {"model": "undistilled", "steps": 4, "nfe": 4, "frechet": 4 * scale},
            plain | {"model": "undistilled, guided", "steps": 2, "nfe": 4, "frechet": 2 * scale},
            plain | {"model": "undistilled", "steps": 2, "nfe": 2, "frechet": 9.0},
            plain
            | {"model": "undistilled", "sampler": "ddim", "steps": 4, "nfe": 4, "frechet": 0.5},
            plain | {"model": "student", "recipe": "mlcm", "steps": 4, "nfe": 4, "frechet": 1.0},
        ]
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "results.json").write_text(json.dumps({"rows": rows}))
    assert over_seeds.main([str(tmp_path / "0"), str(tmp_path / "1")]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = "1.000 ± 0.000 | 0.33 ± 0.24 | 0.500 ± 0.000 | 0.500 ± 0.000"
    assert lines[-1] == f"| mlcm | renoise | 4 | 4 | {figures} |  |"
    assert lines[2].startswith("| undistilled | renoise | 4 | 4 | 8.000 ± 5.657 |  |")


def test_asking_for_no_such_group_lists_them(capsys, monkeypatch):
    monkeypatch.setattr(ablations, "RECIPES", {})  # the real one would keep the variants
    assert ablations.main(["nothing"]) == 2 and ablations.main([]) == 0
    assert "er-sde-5-adversary" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ablations.main(["scott", "--no-such-option"])


def test_every_question_is_asked_from_one_teacher(tmp_path, monkeypatch):
    """The commands that are run: each differs from the base in what it says, takes its teacher, and
    is not repeated once there.
    """
    commands = []

    def run(argv):
        out = run_cifar.parse(argv).out
        (out).mkdir(parents=True, exist_ok=True)
        shutil.copy(checkpoint.pretrained("digits-teacher"), out / "teacher.safetensors")
        (out / "results.json").write_text("{}"), (out / "rows.json").write_text('{"seconds": 9}')
        commands.append(argv)
        return 0

    monkeypatch.setattr(questions.run_cifar, "run", run)
    out = tmp_path / "q"
    assert questions.study(["--data", "digits", "--seed", "3", "--out", str(out)]) == out
    assert len(commands) == len(questions.VARIANTS)
    parsed = {
        Path(argv[argv.index("--out", 6) + 1]).name: run_cifar.parse(argv) for argv in commands
    }
    base = parsed.pop("base")
    assert base.teacher is None and base.steps == (1, 2, 4, 8) and base.x_var == "none"
    for name, args in parsed.items():
        assert (
            args.seed == 3
            and args.teacher == out / "base" / "teacher.safetensors"
            and (out / name / "rows.json").exists()
        )
        differing = {
            k
            for k in ("method", "x_var", "distance", "grid", "init")
            if getattr(args, k) != getattr(base, k)
        }
        expected = {
            "ct": "method",
            "addim": "x_var",
            "huber": "distance",
            "squared": "distance",
            "few-points": "grid",
            "many-points": "grid",
            "random": "init",
        }
        assert differing == {expected[name]}
    assert [parsed[n].grid for n in ("few-points", "many-points")] == [(4, 4), (16, 16)]
    questions.study(["--data", "digits", "--seed", "3", "--out", str(out)])
    assert len(commands) == len(questions.VARIANTS)


def test_answers_are_means_over_seeds(tmp_path):
    for seed, scale in enumerate((1.0, 2.0)):
        for name in questions.VARIANTS:
            rows = [
                {"model": "teacher", "sampler": s, "steps": k, "frechet": 2.0 + (s == "addim")}
                for s in ("ddim", "addim")
                for k in (1, 2, 4, 8, 64)
            ]
            rows += [
                {
                    "model": "student",
                    "recipe": "mcm-ct" if name == "ct" else "mcm-cd",
                    "sampler": "ddim",
                    "steps": k,
                    "frechet": scale * (k + len(name)),
                }
                for k in (1, 2, 4, 8)
            ]
            (tmp_path / str(seed) / name).mkdir(parents=True)
            (tmp_path / str(seed) / name / "results.json").write_text(
                json.dumps({"data": "digits", "settings": {"image_size": 8}, "rows": rows})
            )
    text = questions.answers([tmp_path / "0", tmp_path / "1"])
    assert (
        "| digits 8x8, addim | 9.00 ± 4.24 (4.50) | 19.50 ± 9.19 (9.75) |" in text
    )  # 13 and 26 in 8 steps, over 2
    assert (
        "| digits 8x8, ct | 4.50 ± 2.12 (2.25) | 15.00 ± 7.07 (7.50) |" in text
        and "| *the paper, CT* | 7.2 | 1.5 |" in text
    )
    assert "| digits 8x8, teacher, aDDIM |  | 3.00 ± 0.00 (1.50) |" in text
    assert all(question.title in text for question in questions.QUESTIONS)
    assert "±" not in questions.answers([tmp_path / "0"])


@pytest.mark.slow
def test_costs_are_measured_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        costs.GRIDS,
        "cpu",
        {
            "base": (8, 8, 2),
            "parameters": (8, 16),
            "resolution": (8,),
            "batch": (2,),
            "steps": (1, 2),
        },
    )
    assert costs.main(["--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "costs-cpu.json").read_text())
    small, large = result["parameters"]
    assert (
        large["parameters"] > small["parameters"]
        and all(r["images_per_second"] > 0 and r["flops"] > 0 for r in (small, large))
        and result["peak"] > 1e9
    )
    assert [r["steps"] for r in result["steps"]] == [
        1,
        2,
    ] and "over K forward passes" in capsys.readouterr().out
    assert (tmp_path / "costs-cpu.png").stat().st_size > 10_000


@pytest.mark.slow
def test_networks_of_equal_size_are_compared(tmp_path, monkeypatch, capsys):
    """With this project's own, as the others need not be installed; all must be near to the size
    asked for as well.
    """
    monkeypatch.setattr(
        unet_speed,
        "NETWORKS",
        {k: v for k, v in unet_speed.NETWORKS.items() if k.startswith("mcm")},
    )
    assert (
        unet_speed.main(
            [
                "--parameters",
                "3e5",
                "--size",
                "8",
                "--batch",
                "2",
                "--repeats",
                "2",
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "speed.json"),
            ]
        )
        == 0
    )
    result = json.loads((tmp_path / "speed.json").read_text())
    assert all(
        abs(row["parameters"] - 3e5) < 0.8e5 and row["training"]["images_per_second"] > 0
        for row in result["rows"].values()
    )
    assert (
        result["rows"]["mcm"]["forward"]["over_mcm"] == 1
        and "| mcm, 1 2 4 |" in capsys.readouterr().out
    )


def test_folded_norms_are_the_same_function(network):
    """Scale and shift of the block folded in; gradients too."""
    z, t, labels = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4) % 3
    found = []
    for net in (network, gpu.folded(copy.deepcopy(network))):
        out = net(z, t, labels)
        found.append([out, *torch.autograd.grad(out.square().sum(), list(net.parameters()))])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())
    assert not any(type(m) is torch.nn.GroupNorm for m in gpu.folded(network).modules())


def test_the_run_on_a_gpu_fits_its_time():
    """Its options are those of run_cifar.py; the fastest that has been measured decides lengths."""
    quick = {"ms": 10.0, "first_seconds": 50.0}
    slow = {"ms": 20.0, "first_seconds": 1.0}
    rows = [v | (quick if v["mode"] == "compiled" else slow) for v in gpu.variants(False)]
    rows[0] = {k: v for k, v in rows[0].items() if k != "ms"} | {"error": "no kernel"}
    args = argparse.Namespace(data_dir=Path("data"), toy=False)
    config = run_cifar.parse(list(map(str, gpu.cifar_run(args, rows, 600))))
    assert config.compile and config.batch == 512 and config.data == "cifar10"
    taken = (config.teacher_iterations + sum(config.student_iterations)) * 0.010
    assert 0.8 * 600 < taken < 0.9 * 600 and len(config.student_iterations) == 4
    # compiling has to be earned back
    assert not run_cifar.parse(list(map(str, gpu.cifar_run(args, rows, 150)))).compile
    args.toy = True
    assert run_cifar.parse(list(map(str, gpu.cifar_run(args, [], 600)))).data == "digits"


def test_variants_begin_with_what_matters():
    variants = gpu.variants(False)
    assert len({str(v) for v in variants}) == len(variants) == 2 * 2 * 3 * 4 * 2
    first = variants[0]
    assert (first["preset"], first["batch"], first["mode"]) == ("small", 512, "eager")
    assert variants[-1]["preset"] == "base"


def test_an_sdxl_step_is_measured(tmp_path, monkeypatch, capsys):
    """Phases of one kind once; a run that is cut short goes on."""
    assert [number for number, _ in sdxl_cost.phases_of(RECIPES["mlcm"](4))] == [1, 5]
    out = tmp_path / "cost.json"
    command = "sdxl_cost.py --size tiny --recipes mlcm --steps 2 --rank 4 --device cpu --batches"
    for batches in ("1", "1 2"):
        monkeypatch.setattr("sys.argv", [*command.split(), *batches.split(), "--out", str(out)])
        sdxl_cost.main()
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["phase"], row["batch"]) for row in rows] == [(1, 1), (5, 1), (1, 2), (5, 2)]
    assert all(row["seconds_per_step"] > 0 for row in rows)


def test_what_a_preset_asks_is_counted():
    found = presets.counted("cifar10", "small", 10)
    told = run_cifar.parameters(run_cifar.PRESETS["cifar10", "small"][1])
    assert told == f"{found['parameters'] / 1e6:.1f} M parameters"
    assert 0.9e9 < found["flops"] < 1.0e9  # as counted layer by layer in results/README.md
    # twenty norms with their convolutions keep two images each; none is kept in float32
    assert 2 * 2**20 < found["bytes"] < 6 * 2**20


def test_budgets_of_several_runs_come_into_one_table(tmp_path, capsys):
    """A recipe's students of one K are one curve; undistilled rows are there once."""
    same = {"sampler": "renoise", "coverage": 0.9, "alignment": 0.5}
    for budget, scale in ((60.0, 2.0), (180.0, 1.0)):
        rows = [same | {"model": "undistilled", "steps": 4, "nfe": 4, "frechet": 7.0}]
        for K in (4, 8):
            rows.append(
                same
                | {"model": "student", "recipe": f"mcm-{K}", "steps": K, "nfe": K}
                | {"frechet": scale * K}
            )
        settings = {"evaluations": budget, "iterations": None}
        results = {"settings": settings, "command": f"run {budget}", "rows": rows}
        (tmp_path / f"{budget}").mkdir()
        (tmp_path / f"{budget}" / "results.json").write_text(json.dumps(results))
    runs = [str(tmp_path / "180.0"), str(tmp_path / "60.0")]
    assert budgets.main([*runs, "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| mcm | 60,000 | 8.00, 0.50 | 16.00, 0.50 |",
        "| mcm | 180,000 | 4.00, 0.50 | 8.00, 0.50 |",
    ]
    found = json.loads((tmp_path / "out" / "budgets.json").read_text())
    assert len(found["undistilled"]) == 1 and len(found["students"]) == 4
    assert (tmp_path / "out" / "budgets.png").stat().st_size > 10_000
    older = tmp_path / "older.json"  # one run of before, and another now
    parts = [row for row in found["students"] if row["evaluations"] == 180]
    older.write_text(json.dumps(found | {"students": parts, "commands": ["run 180.0"]}))
    assert budgets.main([str(older), runs[1], "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "budgets.json").read_text()) == found


def test_other_features_rank_models_and_say_how_far_they_agree(tmp_path, monkeypatch):
    """With a stand-in for the third network, on the digits' students that are shipped."""

    class Pixels(torch.nn.Module):
        DIM, head = 64, None

        def features(self, x):
            return x.flatten(1)

    monkeypatch.setattr(features.metrics, "EfficientNetLite0", Pixels)
    run = Path(__file__).resolve().parents[2] / "tutorials" / "weights" / "digits"
    few = "--samples 200 --real 300 --steps 8 1 --teacher-steps 1 8 --iterations 60"
    assert features.main([str(run), *few.split(), "--out", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    rows = {(row["model"], row["steps"]): row for row in found["rows"]}
    for kind in features.KINDS:
        assert rows["teacher", 1][kind] > rows["teacher", 8][kind]
        assert rows["teacher", 1][kind] > rows["cd-1", 1][kind]
        assert f"{kind}, Frechet" in rows["cd-8", 8]
    assert found["kendall_tau"]["teacher: classes and quarter turns"] == 1
    assert str(tmp_path) not in json.dumps(found)
    backwards = [{"model": "teacher", "steps": n} for n in (1, 2)]
    for n, row in enumerate(backwards):
        row |= {"classes": n, "quarter turns": -n, "EfficientNet-Lite0": n}
    told = features.agreement(backwards)
    assert "students: classes and quarter turns" not in told
    assert told["teacher: classes and quarter turns"] == -1
