"""A small world of captioned pictures, drawn to order, and an exact reader of them.

"a small red circle above a large blue square on black": 32x32 RGB, one or two coloured shapes on a striped background. A caption
fixes what and where roughly; it leaves open the exact places and sizes, the direction and phase of the stripes and, where it ends
in "on anything", the colour of the background. So many pictures fit one caption, and a
model that averages them is seen to be wrong. `read` recovers a scene from pixels alone: it is the judge of text-to-image models.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

SIZE = 32
COLOURS = {
    "red": (0.85, 0.1, 0.1),
    "green": (0.1, 0.65, 0.2),
    "blue": (0.15, 0.2, 0.85),
    "yellow": (0.95, 0.85, 0.1),
}
BACKGROUNDS = {
    "black": (0.12, 0.12, 0.12),
    "white": (0.88, 0.88, 0.88),
    "green": (0.12, 0.6, 0.2),
    "blue": (0.15, 0.2, 0.8),
}
SHAPES = {"circle": 0, "square": 4, "triangle": 3}  # corners
RADII = {
    "small": (4.5, 4.9),
    "large": (6.1, 6.5),
}  # in pixels, of the circle; corners stick out beyond it
RELATIONS = {
    "above": (0, -1),
    "below": (0, 1),
    "left of": (-1, 0),
    "right of": (1, 0),
}  # (x, y) of the first seen from the second
CORNER = {"circle": 1.0, "square": 1.3, "triangle": 1.3}  # distance of the corners in radii
STRIPES, PERIOD = 0.1, 8.0  # amplitude and wavelength of the background's stripes
LINE = (np.arange(SIZE) + 0.5).astype(np.float32)
Y, X = np.meshgrid(LINE, LINE, indexing="ij")


@dataclass(frozen=True)
class Object:
    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """objects: one, or two with the first in `relation` to the second; background: a colour, or "anything"."""

    objects: tuple[Object, ...]
    relation: str | None
    background: str

    def caption(self) -> str:
        words = [f"a {o.size} {o.colour} {o.shape}" for o in self.objects]
        return f" {self.relation} ".join(words) + f" on {self.background}"


def scenes() -> list[Scene]:
    """All 9,180 scenes, in a fixed order. No object has the colour of its background."""
    objects = [Object(*o) for o in product(RADII, COLOURS, SHAPES)]
    groups = [((o,), None) for o in objects] + [
        (pair, r) for pair in product(objects, objects) for r in RELATIONS if pair[0] != pair[1]
    ]
    return [
        Scene(g, r, b)
        for g, r in groups
        for b in (*BACKGROUNDS, "anything")
        if b not in {o.colour for o in g}
    ]


def split_scenes(seed: int = 0) -> tuple[list[Scene], list[Scene]]:
    """-> scenes to train on, scenes held out: every tenth combination of objects and relation, whatever its background."""
    everything = scenes()
    combinations = sorted({(s.objects, s.relation) for s in everything}, key=str)
    order = np.random.default_rng(seed).permutation(len(combinations))
    held = {combinations[i] for i in order[: len(order) // 10]}
    return [s for s in everything if (s.objects, s.relation) not in held], [
        s for s in everything if (s.objects, s.relation) in held
    ]


def choose(pool: list[Scene], n: int, seed: int) -> list[Scene]:
    """n scenes from the pool: 15 % with a single object, 40 % with the background left open, otherwise evenly."""
    rng = np.random.default_rng(seed)
    kinds: dict[tuple[bool, bool], list[Scene]] = {}
    for scene in pool:
        kinds.setdefault((len(scene.objects) == 1, scene.background == "anything"), []).append(
            scene
        )
    return [
        (k := kinds[bool(rng.random() < 0.15), bool(rng.random() < 0.4)])[rng.integers(len(k))]
        for _ in range(n)
    ]


def silhouette(shape: str, radius: float, cx: float, cy: float) -> np.ndarray:
    """(SIZE, SIZE) coverage in [0, 1], anti-aliased by the signed distance to the edge. Squares and triangles stand on a side."""
    dx, dy, corners = X - cx, Y - cy, SHAPES[shape]
    if not corners:
        distance = np.hypot(dx, dy) - radius
    else:
        angles = [
            np.pi / 2 + 2 * np.pi * k / corners for k in range(corners)
        ]  # of the sides, the first one below
        distance = np.max(
            [dx * np.cos(a) + dy * np.sin(a) for a in angles], axis=0
        ) - radius * CORNER[shape] * np.cos(np.pi / corners)
    return np.clip(0.5 - distance, 0, 1)


def draw(pool: list[Scene], seed: int) -> Tensor:
    """One picture of each scene: (n, 3, SIZE, SIZE) uint8. What the caption leaves open is drawn at random from the seed."""
    return torch.from_numpy(
        np.stack([_draw(scene, np.random.default_rng((seed, i))) for i, scene in enumerate(pool)])
    )


def _draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    colours = {o.colour for o in scene.objects}
    background = (
        rng.choice([b for b in BACKGROUNDS if b not in colours])
        if scene.background == "anything"
        else scene.background
    )
    direction, phase = np.pi / 2 * rng.integers(2), 2 * np.pi * rng.random()
    wave = np.sin(2 * np.pi / PERIOD * (X * np.cos(direction) + Y * np.sin(direction)) + phase)
    while True:  # until the objects do not touch
        masks = []
        for i, o in enumerate(scene.objects):
            if scene.relation:
                along = np.array(RELATIONS[scene.relation]) * (7.75 if i == 0 else -7.75)
                spread = np.where(along != 0, 0.5, 3.0)
            else:
                along, spread = np.zeros(2), np.full(2, 4.0)
            x, y = 16 + along + spread * rng.uniform(-1, 1, 2)
            masks.append(silhouette(o.shape, rng.uniform(*RADII[o.size]), x, y))
        if (
            len(masks) == 1
            or not (ndimage.binary_dilation(masks[0] > 0, iterations=2) & (masks[1] > 0)).any()
        ):
            break
    picture = np.array(BACKGROUNDS[background])[:, None, None] + STRIPES * wave
    for o, mask in zip(scene.objects, masks):
        picture = picture * (1 - mask) + np.array(COLOURS[o.colour])[:, None, None] * mask
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


# --- the reader ----------------------------------------------------------------------------------------------------------

COLOUR_LIMIT = 0.22  # a colour further from all palette entries is none of them
SHAPE_LIMIT = 0.28  # a silhouette that differs from all templates by more than this share of its area is no shape


def nearest_colour(rgb: np.ndarray, palette: dict[str, tuple]) -> str | None:
    distances = {
        name: float(np.linalg.norm(rgb - np.array(value))) for name, value in palette.items()
    }
    name = min(distances, key=distances.get)
    return name if distances[name] <= COLOUR_LIMIT else None


def read(picture: np.ndarray | Tensor) -> Scene | None:
    """The scene in a picture (3, SIZE, SIZE), uint8 or float in [0, 1]; None if it is not clearly one of this world.

    Background: the median of the border. Objects: connected regions that differ from it. Colour: the nearest palette entry, within a
    limit. Shape, size: the template of equal area at the region's centroid that fits best, within a limit. Relation:
    the larger coordinate of the difference of the centroids.
    """
    picture = np.asarray(picture)
    picture = picture / 255.0 if picture.dtype == np.uint8 else picture.astype(np.float64)
    border = np.concatenate(
        [
            picture[:, :2].reshape(3, -1),
            picture[:, -2:].reshape(3, -1),
            picture[:, :, :2].reshape(3, -1),
            picture[:, :, -2:].reshape(3, -1),
        ],
        1,
    )
    ground = np.median(border, axis=1)
    background = nearest_colour(ground, BACKGROUNDS)
    away = np.linalg.norm(picture - ground[:, None, None], axis=0)
    regions, count = ndimage.label(away > 0.36, np.ones((3, 3)))
    areas = np.bincount(regions.ravel())[1:]
    if background is None or not 1 <= (areas >= 4).sum() <= 2:
        return None
    found = []
    for index in np.flatnonzero(areas >= 4) + 1:
        entry = _read_object(picture, ground, regions == index)
        if entry is None:
            return None
        found.append(entry)
    if len(found) == 1:
        return Scene((found[0][0],), None, background)
    (first, at), (second, other) = found
    difference = at - other
    axis = int(np.abs(difference[1]) > np.abs(difference[0]))
    relation = next(
        name for name, sign in RELATIONS.items() if sign[axis] == np.sign(difference[axis])
    )
    return Scene((first, second), relation, background)


def _read_object(
    picture: np.ndarray, ground: np.ndarray, region: np.ndarray
) -> tuple[Object, np.ndarray] | None:
    """-> the object and its centroid (x, y)."""
    core = ndimage.binary_erosion(region)
    if core.sum() < 4:
        return None
    rgb = np.median(picture[:, core], axis=1)
    colour = nearest_colour(rgb, COLOURS)
    if colour is None:
        return None
    toward = (rgb - ground) / np.sum((rgb - ground) ** 2)
    cover = np.clip(
        np.tensordot(toward, picture - ground[:, None, None], 1), 0, 1
    ) * ndimage.binary_dilation(region, np.ones((3, 3)))
    area = cover.sum()
    cx, cy = (cover * X).sum() / area, (cover * Y).sum() / area
    best = None
    for shape, corners in SHAPES.items():
        unit = (
            np.pi if not corners else corners / 2 * np.sin(2 * np.pi / corners) * CORNER[shape] ** 2
        )
        radius = np.sqrt(area / unit)
        error = np.abs(silhouette(shape, radius, cx, cy) - cover).sum() / area
        if best is None or error < best[0]:
            best = error, shape, radius
    error, shape, radius = best
    if error > SHAPE_LIMIT:
        return None
    return Object("large" if radius >= 5.5 else "small", colour, shape), np.array([cx, cy])


def agrees(scene: Scene, asked: Scene) -> bool:
    """Whether what was read is what the caption asked for; of two objects, either may have been found first."""
    opposite = {
        "above": "below",
        "below": "above",
        "left of": "right of",
        "right of": "left of",
        None: None,
    }
    flipped = Scene(scene.objects[::-1], opposite[scene.relation], scene.background)
    return any(
        (s.objects, s.relation) == (asked.objects, asked.relation) for s in (scene, flipped)
    ) and asked.background in (scene.background, "anything")


def alignment(pictures: Tensor, asked: list[Scene]) -> Tensor:
    """(n,) bool: which pictures (n, 3, SIZE, SIZE; uint8, or float in [-1, 1]) show all that their caption says."""
    arrays = (
        (pictures if pictures.dtype == torch.uint8 else (pictures.clamp(-1, 1) + 1) / 2)
        .cpu()
        .numpy()
    )
    return torch.tensor(
        [
            (scene := read(picture)) is not None and agrees(scene, want)
            for picture, want in zip(arrays, asked)
        ]
    )
