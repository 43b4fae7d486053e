"""Pathfinder: whether two dots are at the ends of the same dashed path, or at ends of two different paths.

Linsley et al. 2018 (arXiv 1805.08315), Kim et al. 2020 (arXiv 1906.01558). An image has two long paths and some short
ones, all dashed and smooth, which never meet or cross. Two dots mark the two ends of one long path (class 1), or one
end of each (class 0). Classes alternate with the index.

Lengths, thickness, dots and numbers of paths are those of the Long Range Arena for its images of 32 x 32 and, for
Pathfinder-X, of 128 x 128. The curvature and the distance of paths are this generator's own: paths are further from
each other than two dashes of one path, so that an image is unambiguous.

An image is a pure function of the settings, the split, its index and the attempt. Coordinates are (x, y) in pixels.
During the layout of paths they are complex numbers x + iy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np
from pydantic import Field

from bst_base.settings import Config

LONG = 14
"""Number of dashes of a long path, as in the hardest of the published sets."""
TURN = math.radians(40)
"""Maximum angle between consecutive dashes."""
TRIES = 8
"""Number of directions tried for a dash before the path is started again."""
STARTS = 60
"""Number of starts tried for a path before the image is started again."""
CIRCLE = np.exp(2j * np.pi * np.arange(16) / 16)


@dataclass(frozen=True)
class Geometry:
    """Sizes of an image, in pixels."""

    dash: float
    gap: float
    thickness: float
    dot: float
    """Radius of a dot."""
    short: int
    """Number of dashes of a distractor path."""
    distractors: int

    @property
    def clearance(self) -> float:
        """Minimum distance between the centre lines of two paths, visibly larger than a gap between dashes."""
        return 1.5 * self.gap + self.thickness


GEOMETRY = {
    32: Geometry(dash=2, gap=1, thickness=0.5, dot=1.5, short=4, distractors=5),
    128: Geometry(dash=5, gap=2, thickness=1.5, dot=3, short=4, distractors=7),
}


class PathfinderConfig(Config):
    """Settings of generated images. The default numbers of examples are those of the Long Range Arena."""

    task: Literal["pathfinder"] = "pathfinder"
    train: int = Field(160_000, ge=1)
    """Examples of the training split."""
    validation: int = Field(20_000, ge=1)
    """Examples of the validation split."""
    test: int = Field(20_000, ge=1)
    """Examples of the test split."""
    size: Literal[32, 128] = 32
    """Width and height in pixels; 128 is Pathfinder-X."""
    seed: int = 0
    """Seed of the generated images."""


@dataclass(frozen=True)
class Drawing:
    """The contents of an image."""

    paths: list[np.ndarray]
    """Dashes of each path, (n, 2, 2): begin and end of each dash. The two long paths come first."""
    dots: np.ndarray
    """(2, 2) centres of the dots."""
    label: int


def example(config: PathfinderConfig, split: str, index: int, attempt: int = 0) -> tuple[list[np.ndarray], int]:
    """Return one example: a list with its only sequence, the pixels row by row (size²,) uint8, and its class."""
    drawing = draw(config, split, index, attempt)
    return [render(drawing, config.size).reshape(-1)], drawing.label


def draw(config: PathfinderConfig, split: str, index: int, attempt: int = 0) -> Drawing:
    """Return the paths and dots of an example."""
    random = Random(f"pathfinder/{config.size}/{config.seed}/{split}/{index}/{attempt}")
    label = index % 2
    while (drawing := _draw(random, GEOMETRY[config.size], config.size, label)) is None:
        pass
    return drawing


def _draw(random: Random, geometry: Geometry, size: int, label: int) -> Drawing | None:
    """Return paths at a distance from each other, with dots; None if there is no room for a path."""
    dotted = [(0, 1), ()] if label else [(_coin(random),), (_coin(random),)]  # ends of the long paths with a dot
    paths: list[np.ndarray] = []
    dots: list[complex] = []
    taken = np.empty(0, complex)
    for number in range(2 + geometry.distractors):
        path = _room_for(random, geometry, size, LONG if number < 2 else geometry.short, taken)
        if path is None:
            return None
        paths.append(path)
        own = [path[0, 0], path[-1, 1]] if number < 2 else []
        dots += [own[end] for end in (dotted[number] if own else ())]
        # The ends keep this distance with or without a dot, so that the free space does not reveal the class.
        around = [end + geometry.dot * CIRCLE for end in own]
        taken = np.concatenate([taken, *map(_points, path), *around])
    return Drawing([_pairs(path) for path in paths], _pairs(np.array(dots)), label)


def _coin(random: Random) -> int:
    return int(random.random() < 0.5)


def _room_for(random: Random, geometry: Geometry, size: int, dashes: int, taken: np.ndarray) -> np.ndarray | None:
    """Return a path of `dashes` dashes, or None if STARTS starts find no room."""
    paths = (_path(random, geometry, size, dashes, taken) for _ in range(STARTS))
    return next((path for path in paths if path is not None), None)


def _path(random: Random, geometry: Geometry, size: int, dashes: int, taken: np.ndarray) -> np.ndarray | None:
    """Return a path (dashes, 2) complex inside the image, at a distance from `taken` and itself; None if it fails."""
    inside = size - 2 * geometry.dot
    place = complex(geometry.dot + random.random() * inside, geometry.dot + random.random() * inside)
    heading = random.random() * 2 * math.pi
    path: list[np.ndarray] = []
    behind = taken  # the points that the next dash must keep away from: all except the dash that it continues
    for _ in range(dashes):
        for _ in range(TRIES):
            turned = heading + (2 * random.random() - 1) * TURN
            step = complex(math.cos(turned), math.sin(turned))
            begin = place + (step * geometry.gap if path else 0)
            dash = np.array((begin, begin + step * geometry.dash))
            if _inside(dash[1], geometry.dot, size) and _clear(_points(dash), behind, geometry.clearance):
                break
        else:
            return None
        behind = np.concatenate((behind, _points(path[-1]))) if path else behind
        path.append(dash)
        heading, place = turned, dash[1]
    ends = np.array((path[0][0], path[-1][1]))
    if dashes == LONG and not _clear(ends, taken, geometry.dot + geometry.clearance):
        return None
    return np.stack(path)


def _inside(point: complex, margin: float, size: int) -> bool:
    return margin <= point.real <= size - margin and margin <= point.imag <= size - margin


def _points(dash: np.ndarray) -> np.ndarray:
    """Return points along a dash, at most half a pixel apart."""
    count = 1 + math.ceil(2 * abs(dash[1] - dash[0]))
    return dash[0] + (dash[1] - dash[0]) * (np.arange(count) / (count - 1))


def _clear(points: np.ndarray, taken: np.ndarray, distance: float) -> bool:
    """Whether all points are at least `distance` away from all points in `taken`."""
    return not len(taken) or np.abs(points[:, None] - taken).min() >= distance


def _pairs(points: np.ndarray) -> np.ndarray:
    """Convert (...) complex to (..., 2) real."""
    return np.stack((points.real, points.imag), axis=-1)


def render(drawing: Drawing, size: int) -> np.ndarray:
    """Return the image (size, size) uint8, white on black, with grey values by the estimated coverage of each pixel."""
    picture = np.zeros((size, size))
    thickness = GEOMETRY[size].thickness
    for dash in np.concatenate(drawing.paths):
        _brush(picture, dash, thickness / 2)
    for dot in drawing.dots:
        _brush(picture, np.stack((dot, dot)), GEOMETRY[size].dot)
    return np.round(255 * picture).astype(np.uint8)


def _brush(picture: np.ndarray, line: np.ndarray, radius: float) -> None:
    """Draw the area within `radius` of a line (2, 2) into `picture`, with a soft edge of one pixel."""
    low = np.maximum(np.floor(line.min(0) - radius - 1), 0).astype(int)
    high = np.minimum(np.ceil(line.max(0) + radius + 1), len(picture)).astype(int)
    x, y = np.arange(low[0], high[0]) + 0.5, np.arange(low[1], high[1])[:, None] + 0.5  # pixel centres
    along = line[1] - line[0]
    square = along @ along
    place = np.clip(((x - line[0, 0]) * along[0] + (y - line[0, 1]) * along[1]) / square, 0, 1) if square else 0.0
    distance = np.hypot(x - line[0, 0] - place * along[0], y - line[0, 1] - place * along[1])
    box = picture[low[1] : high[1], low[0] : high[0]]
    np.maximum(box, np.clip(radius + 0.5 - distance, 0, 1), out=box)
