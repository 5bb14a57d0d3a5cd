#!/usr/bin/env python3
"""The papers' main ablations, from one teacher at equal network evaluations: run_latent.py with a
few more recipes.

    python benchmarks/ablations.py progressive states
        the groups that are named, of those below, or all
    python benchmarks/ablations.py scott --out runs/scott --seed 1
        whatever run_latent.py takes may follow

Results, pictures and students are those of run_latent.py, in --out (default: runs/ablations).
Without a group, all are listed, each with what its paper found.
"""

import sys
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_latent
from mcm.latent.recipes import RECIPES, Phase, Recipe, mlcm_latent, scott_latent, tlcm_latent


def variant(recipe: Recipe, phases: tuple[Phase, ...]) -> Recipe:
    """These phases, sampled as the recipe is."""
    return Recipe(phases, recipe.renoise, f"{recipe.summary.split(':')[0]}, an ablation")


def segments(*numbers: int, **changes) -> Recipe:
    """MLCM without its last phase, the preference, on these numbers of segments, in turn."""
    recipe = mlcm_latent(4)
    kept = [p for p in recipe.phases[:-1] if p.method.student_steps in numbers]
    return variant(recipe, tuple(replace(phase, **changes) for phase in kept))


def scott(eta: float | str, adversary: bool) -> Recipe:
    """SCott without its averaged target, and compared as velocities.

    As it is, so short a run stays near the teacher's weights whatever its steps.
    """
    recipe = scott_latent(4)
    phase = recipe.phases[0]
    order = 2 if eta == "er5" else 1
    method = replace(phase.method, teacher_eta=eta, solver_order=order, weight="v")
    objectives = phase.objectives if adversary else ()
    changed = replace(phase, method=method, objectives=objectives, target_ema=None)
    return variant(recipe, (changed,))


tlcm = tlcm_latent(4)
# With the printed shares and rates the later phases of so short a run are two dozen small steps.
# Here they get more, at the full rate.
TLCM_PHASES = tuple(
    replace(phase, share=share, lr=1.0, critic_lr=1.0)
    for phase, share in zip(tlcm.phases, (0.4, 0.35, 0.05, 0.2))
)
GROUPS: dict[str, tuple[str, dict[str, Recipe]]] = {
    "progressive": (
        "TLCM (arXiv 2406.05768v6), table 2, FID in 4 steps: one segment 32.9, eight segments "
        "27.0. MLCM (v1): ever fewer segments.",
        {
            "8-4-2-1": segments(8, 4, 2, 1),
            "8-4-2": segments(8, 4, 2),
            "only-8": segments(8),
            "only-2": segments(2),
            "only-1": segments(1),
        },
    ),
    "states": (
        "TLCM (v6): states from the teacher's own denoising do without images (table 2 has them "
        "against single-step ones, not images).",
        {"8-4-2-1": segments(8, 4, 2, 1), "data-states": segments(8, 4, 2, 1, states="data")},
    ),
    "tlcm": (
        "TLCM (v6), table 2, CLIP score in 4 steps: first stage 32.31, then all at once 33.06, "
        "preference 33.16, matching and adversary 33.52.",
        {f"tlcm-{n}": variant(tlcm, TLCM_PHASES[:n]) for n in (1, 2, 3, 4)},
    ),
    "scott": (
        "SCott (arXiv 2403.01505), FID in 2 steps: eta 0 27.4, 0.2 25.2, 0.6 29.7, ER-SDE 5 24.9; "
        "no adversary 25.0, with it 21.9.",
        {
            name: scott(noise, False)
            for name, noise in {
                "eta-0": 0.0,
                "eta-0.2": 0.2,
                "eta-0.6": 0.6,
                "er-sde-5": "er5",
            }.items()
        }
        | {"eta-0-adversary": scott(0.0, True), "er-sde-5-adversary": scott("er5", True)},
    ),
}


def main(argv: list[str]) -> int:
    names = list(takewhile([*GROUPS, "all"].__contains__, argv))
    if not names:
        print(__doc__)
        print(
            "\n".join(
                f"{name}: {', '.join(variants)}\n    {claim}"
                for name, (claim, variants) in GROUPS.items()
            )
        )
        return 0 if argv in ([], ["--help"], ["-h"]) else 2
    rest, variants = argv[len(names) :], {}
    for name in GROUPS if "all" in names else names:
        claim, recipes = GROUPS[name]
        print(claim)
        variants |= recipes
    RECIPES.update({name: lambda K, recipe=recipe: recipe for name, recipe in variants.items()})
    out = [] if "--out" in rest else ["--out", "runs/ablations"]
    return run_latent.run(["--recipe", *variants, *out, *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
