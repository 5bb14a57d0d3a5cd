"""A small world of captioned images, drawn to order, and an exact reader of them.

"a small red circle above a large blue square on black": 32x32 RGB, one or two coloured shapes on a
striped background. A caption fixes what and where roughly; it leaves open the exact places and
sizes, the direction and phase of the stripes and, where it ends in "on anything", the colour of the
background. So many images fit one caption, and a model that averages them is seen to be wrong.
`read` recovers a scene from pixels alone: it is the judge of text-to-image models.
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
# in pixels, of the circle; corners stick out beyond it
RADII = {"small": (4.5, 4.9), "large": (6.1, 6.5)}
# (x, y) of the first seen from the second
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
CORNER = {"circle": 1.0, "square": 1.3, "triangle": 1.3}  # distance of the corners in radii
STRIPES = 0.1  # amplitude of the background's stripes
PERIOD = 8.0  # their wavelength, in pixels
LINE = (np.arange(SIZE) + 0.5).astype(np.float32)
Y, X = np.meshgrid(LINE, LINE, indexing="ij")


@dataclass(frozen=True)
class Object:
    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """objects: one, or two with the first in `relation` to the second.

    background: a colour, or "anything".
    """

    objects: tuple[Object, ...]
    relation: str | None
    background: str

    def caption(self) -> str:
        words = [f"a {o.size} {o.colour} {o.shape}" for o in self.objects]
        return f" {self.relation} ".join(words) + f" on {self.background}"


def scenes() -> list[Scene]:
    """All 9,180 scenes, in a fixed order. No object has the colour of its background."""
    objects = [Object(*o) for o in product(RADII, COLOURS, SHAPES)]
    pairs = [(pair, r) for pair in product(objects, objects) for r in RELATIONS]
    groups = [((o,), None) for o in objects] + [(p, r) for p, r in pairs if p[0] != p[1]]
    everything = [Scene(g, r, b) for g, r in groups for b in (*BACKGROUNDS, "anything")]
    return [s for s in everything if s.background not in {o.colour for o in s.objects}]


def split_scenes(seed: int = 0) -> tuple[list[Scene], list[Scene]]:
    """-> scenes to train on, scenes held out.

    Every tenth combination of objects and relation is held out, whatever its background.
    """
    everything = scenes()
    combinations = sorted({(s.objects, s.relation) for s in everything}, key=str)
    order = np.random.default_rng(seed).permutation(len(combinations))
    held = {combinations[i] for i in order[: len(order) // 10]}
    kept = [s for s in everything if (s.objects, s.relation) not in held]
    return kept, [s for s in everything if (s.objects, s.relation) in held]


def choose(pool: list[Scene], n: int, seed: int) -> list[Scene]:
    """n scenes: 15 % with a single object, 40 % with the background left open, otherwise evenly."""
    rng = np.random.default_rng(seed)
    kinds: dict[tuple[bool, bool], list[Scene]] = {}
    for scene in pool:
        kind = (len(scene.objects) == 1, scene.background == "anything")
        kinds.setdefault(kind, []).append(scene)
    chosen = []
    for _ in range(n):
        those = kinds[bool(rng.random() < 0.15), bool(rng.random() < 0.4)]
        chosen.append(those[rng.integers(len(those))])
    return chosen


def silhouette(shape: str, radius: float, cx: float, cy: float) -> np.ndarray:
    """(SIZE, SIZE) coverage in [0, 1], anti-aliased by the signed distance to the edge.

    Squares and triangles stand on a side.
    """
    dx = X - cx
    dy = Y - cy
    corners = SHAPES[shape]
    if not corners:
        distance = np.hypot(dx, dy) - radius
    else:
        # of the sides, the first one below
        angles = [np.pi / 2 + 2 * np.pi * k / corners for k in range(corners)]
        sides = [dx * np.cos(a) + dy * np.sin(a) for a in angles]
        distance = np.max(sides, axis=0) - radius * CORNER[shape] * np.cos(np.pi / corners)
    return np.clip(0.5 - distance, 0, 1)


def draw(pool: list[Scene], seed: int) -> Tensor:
    """One image of each scene: (n, 3, SIZE, SIZE) uint8.

    What the caption leaves open is drawn at random from the seed.
    """
    images = [_draw(scene, np.random.default_rng((seed, i))) for i, scene in enumerate(pool)]
    return torch.from_numpy(np.stack(images))


def _draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    colours = {o.colour for o in scene.objects}
    background = scene.background
    if background == "anything":
        background = rng.choice([b for b in BACKGROUNDS if b not in colours])
    direction = np.pi / 2 * rng.integers(2)
    phase = 2 * np.pi * rng.random()
    wave = np.sin(2 * np.pi / PERIOD * (X * np.cos(direction) + Y * np.sin(direction)) + phase)
    masks = _place(scene, rng)
    while len(masks) == 2 and _touch(*masks):
        masks = _place(scene, rng)
    image = np.array(BACKGROUNDS[background])[:, None, None] + STRIPES * wave
    for o, mask in zip(scene.objects, masks):
        image = image * (1 - mask) + np.array(COLOURS[o.colour])[:, None, None] * mask
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _place(scene: Scene, rng: np.random.Generator) -> list[np.ndarray]:
    """The silhouettes of the objects, at random places of their own."""
    masks = []
    for i, o in enumerate(scene.objects):
        along = np.zeros(2)
        spread = np.full(2, 4.0)
        if scene.relation:
            along = np.array(RELATIONS[scene.relation]) * (7.75 if i == 0 else -7.75)
            spread = np.where(along != 0, 0.5, 3.0)
        x, y = 16 + along + spread * rng.uniform(-1, 1, 2)
        masks.append(silhouette(o.shape, rng.uniform(*RADII[o.size]), x, y))
    return masks


def _touch(first: np.ndarray, second: np.ndarray) -> bool:
    return bool((ndimage.binary_dilation(first > 0, iterations=2) & (second > 0)).any())


# --- the reader -----------------------------------------------------------------------------------

COLOUR_LIMIT = 0.22  # a colour further from all palette entries is none of them
SHAPE_LIMIT = 0.28  # a silhouette that differs from all templates by more of its area is no shape


def nearest_colour(rgb: np.ndarray, palette: dict[str, tuple]) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(c))) for name, c in palette.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= COLOUR_LIMIT else None


def read(image: np.ndarray | Tensor) -> Scene | None:
    """The scene in an image (3, SIZE, SIZE), uint8 or float in [0, 1].

    None if it is not clearly one of this world. Background: the median of the border. Objects:
    connected regions that differ from it. Colour: the nearest palette entry, within a limit. Shape,
    size: the template of equal area at the region's centroid that fits best, within a limit.
    Relation: the larger coordinate of the difference of the centroids.
    """
    image = np.asarray(image)
    image = image / 255.0 if image.dtype == np.uint8 else image.astype(np.float64)
    sides = (image[:, :2], image[:, -2:], image[:, :, :2], image[:, :, -2:])
    ground = np.median(np.concatenate([side.reshape(3, -1) for side in sides], 1), axis=1)
    background = nearest_colour(ground, BACKGROUNDS)
    away = np.linalg.norm(image - ground[:, None, None], axis=0)
    regions, _ = ndimage.label(away > 0.36, np.ones((3, 3)))
    areas = np.bincount(regions.ravel())[1:]
    if background is None or not 1 <= (areas >= 4).sum() <= 2:
        return None
    indices = np.flatnonzero(areas >= 4) + 1
    found: list = [_read_object(image, ground, regions == index) for index in indices]
    if None in found:
        return None
    if len(found) == 1:
        return Scene((found[0][0],), None, background)
    (first, at), (second, other) = found
    difference = np.array(at) - np.array(other)
    axis = int(np.abs(difference[1]) > np.abs(difference[0]))
    sign = np.sign(difference[axis])
    relation = next(name for name, signs in RELATIONS.items() if signs[axis] == sign)
    return Scene((first, second), relation, background)


def _read_object(
    image: np.ndarray, ground: np.ndarray, region: np.ndarray
) -> tuple[Object, tuple[float, float]] | None:
    """-> the object and its centroid (x, y)."""
    core = ndimage.binary_erosion(region)
    if core.sum() < 4:
        return None
    rgb = np.median(image[:, core], axis=1)
    colour = nearest_colour(rgb, COLOURS)
    if colour is None:
        return None
    toward = (rgb - ground) / np.sum((rgb - ground) ** 2)
    cover = np.clip(np.tensordot(toward, image - ground[:, None, None], 1), 0, 1)
    cover = cover * ndimage.binary_dilation(region, np.ones((3, 3)))
    area = cover.sum()
    cx = (cover * X).sum() / area
    cy = (cover * Y).sum() / area
    fits = []
    for shape, corners in SHAPES.items():
        unit = np.pi  # the area at radius 1
        if corners:
            unit = corners / 2 * np.sin(2 * np.pi / corners) * CORNER[shape] ** 2
        radius = np.sqrt(area / unit)
        error = np.abs(silhouette(shape, radius, cx, cy) - cover).sum() / area
        fits.append((error, shape, radius))
    error, shape, radius = min(fits)
    if error > SHAPE_LIMIT:
        return None
    return Object("large" if radius >= 5.5 else "small", colour, shape), (cx, cy)


OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def agrees(scene: Scene, asked: Scene) -> bool:
    """Whether what was read is what the caption asked for.

    Of two objects, either may have been found first.
    """
    flipped = (scene.objects[::-1], OPPOSITE.get(scene.relation))
    wanted = (asked.objects, asked.relation)
    same = wanted in ((scene.objects, scene.relation), flipped)
    return same and asked.background in (scene.background, "anything")


def alignment(images: Tensor, asked: list[Scene]) -> Tensor:
    """(n,) bool: which images show all that their caption says.

    images: (n, 3, SIZE, SIZE), uint8, or float in [-1, 1].
    """
    if images.dtype != torch.uint8:
        images = (images.clamp(-1, 1) + 1) / 2
    scenes = [read(image) for image in images.cpu().numpy()]
    return torch.tensor([s is not None and agrees(s, want) for s, want in zip(scenes, asked)])
