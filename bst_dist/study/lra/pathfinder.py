"""Pathfinder: do two dots lie on the ends of one dashed path, or on ends of two?

Linsley et al. 2018 (arXiv 1805.08315), Kim et al. 2020 (arXiv 1906.01558). An image has two long paths and some short
ones, all dashed and smooth, which never meet or cross. Two dots mark the two ends of one long path (class 1), or one
end of each (class 0). Classes alternate with the index.

Lengths, thickness, dots and numbers are those that the Long Range Arena names for its images of 32 x 32 and, for
Pathfinder-X, of 128 x 128. How a path turns and how paths keep their distance is this generator's own: paths are
further from each other than two dashes of one path, so the picture has one reading.

An image is a pure function of the settings, the split, its index and the attempt. Coordinates are (x, y) in pixels;
while paths are laid out, complex numbers x + iy.
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
"""Dashes of a long path, in the hardest of the published sets."""
TURN = math.radians(40)
"""The most that a path turns from dash to dash."""
TRIES = 8
"""Directions tried for a dash before the path is begun anew."""
STARTS = 60
"""Beginnings tried for a path before the image is begun anew."""
CIRCLE = np.exp(2j * np.pi * np.arange(16) / 16)


@dataclass(frozen=True)
class Geometry:
    """Sizes of an image, in pixels."""

    dash: float
    gap: float
    thickness: float
    dot: float
    """Radius."""
    short: int
    """Dashes of a distracting path."""
    distractors: int

    @property
    def clearance(self) -> float:
        """Least distance of two paths' middle lines: it shows as more than a gap."""
        return 1.5 * self.gap + self.thickness


GEOMETRY = {
    32: Geometry(dash=2, gap=1, thickness=0.5, dot=1.5, short=4, distractors=5),
    128: Geometry(dash=5, gap=2, thickness=1.5, dot=3, short=4, distractors=7),
}


class PathfinderConfig(Config):
    """Images to draw; the defaults are the Long Range Arena's numbers."""

    task: Literal["pathfinder"] = "pathfinder"
    train: int = Field(160_000, ge=1)
    """Examples of the training split."""
    validation: int = Field(20_000, ge=1)
    """Examples of the validation split."""
    test: int = Field(20_000, ge=1)
    """Examples of the test split."""
    size: Literal[32, 128] = 32
    """Pixels of a side: 128 is Pathfinder-X."""
    seed: int = 0
    """Other seeds give other images."""


@dataclass(frozen=True)
class Drawing:
    """What an image shows."""

    paths: list[np.ndarray]
    """Dashes of each path, (n, 2, 2): begin and end; the two long ones first."""
    dots: np.ndarray
    """(2, 2)"""
    label: int


def example(config: PathfinderConfig, split: str, index: int, attempt: int = 0) -> tuple[list[np.ndarray], int]:
    """One example: its only sequence, the pixels row by row (size²,) uint8, and its class."""
    drawing = draw(config, split, index, attempt)
    return [render(drawing, config.size).reshape(-1)], drawing.label


def draw(config: PathfinderConfig, split: str, index: int, attempt: int = 0) -> Drawing:
    """The paths and dots of an example."""
    random = Random(f"pathfinder/{config.size}/{config.seed}/{split}/{index}/{attempt}")
    label = index % 2
    while (drawing := _draw(random, GEOMETRY[config.size], config.size, label)) is None:
        pass
    return drawing


def _draw(random: Random, geometry: Geometry, size: int, label: int) -> Drawing | None:
    """Paths that keep clear of each other, and dots on them; None when there is no room for one."""
    dotted = [(0, 1), ()] if label else [(_coin(random),), (_coin(random),)]  # which ends of the long paths
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
        around = [end + geometry.dot * CIRCLE for end in own]  # with or without a dot: it must not tell by itself
        taken = np.concatenate([taken, *map(_points, path), *around])
    return Drawing([_pairs(path) for path in paths], _pairs(np.array(dots)), label)


def _coin(random: Random) -> int:
    return int(random.random() < 0.5)


def _room_for(random: Random, geometry: Geometry, size: int, dashes: int, taken: np.ndarray) -> np.ndarray | None:
    """A path of so many dashes that found room in so many starts; or None."""
    paths = (_path(random, geometry, size, dashes, taken) for _ in range(STARTS))
    return next((path for path in paths if path is not None), None)


def _path(random: Random, geometry: Geometry, size: int, dashes: int, taken: np.ndarray) -> np.ndarray | None:
    """A path of so many dashes (n, 2) complex that stays inside, clear of what is taken and of itself; or None."""
    inside = size - 2 * geometry.dot
    place = complex(geometry.dot + random.random() * inside, geometry.dot + random.random() * inside)
    heading = random.random() * 2 * math.pi
    path: list[np.ndarray] = []
    behind = taken  # what the next dash must keep clear of: all but the dash that it continues from
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
    """Points along a dash, at most half a pixel apart."""
    count = 1 + math.ceil(2 * abs(dash[1] - dash[0]))
    return dash[0] + (dash[1] - dash[0]) * (np.arange(count) / (count - 1))


def _clear(points: np.ndarray, taken: np.ndarray, distance: float) -> bool:
    """Whether all points are at least so far from all that are taken."""
    return not len(taken) or np.abs(points[:, None] - taken).min() >= distance


def _pairs(points: np.ndarray) -> np.ndarray:
    """(...) complex -> (..., 2) real."""
    return np.stack((points.real, points.imag), axis=-1)


def render(drawing: Drawing, size: int) -> np.ndarray:
    """The picture, (size, size) uint8, white on black: what share of each pixel is covered, from distances."""
    picture = np.zeros((size, size))
    thickness = GEOMETRY[size].thickness
    for dash in np.concatenate(drawing.paths):
        _brush(picture, dash, thickness / 2)
    for dot in drawing.dots:
        _brush(picture, np.stack((dot, dot)), GEOMETRY[size].dot)
    return np.round(255 * picture).astype(np.uint8)


def _brush(picture: np.ndarray, line: np.ndarray, radius: float) -> None:
    """Draw all that is within `radius` of a line (2, 2), with an edge of one pixel, over what is there."""
    low = np.maximum(np.floor(line.min(0) - radius - 1), 0).astype(int)
    high = np.minimum(np.ceil(line.max(0) + radius + 1), len(picture)).astype(int)
    x, y = np.arange(low[0], high[0]) + 0.5, np.arange(low[1], high[1])[:, None] + 0.5  # the middles of pixels
    along = line[1] - line[0]
    square = along @ along
    place = np.clip(((x - line[0, 0]) * along[0] + (y - line[0, 1]) * along[1]) / square, 0, 1) if square else 0.0
    distance = np.hypot(x - line[0, 0] - place * along[0], y - line[0, 1] - place * along[1])
    box = picture[low[1] : high[1], low[0] : high[0]]
    np.maximum(box, np.clip(radius + 0.5 - distance, 0, 1), out=box)
