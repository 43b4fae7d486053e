"""Pathfinder: labels compared with a flood fill of the drawing, and other properties of the images."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from bst_dist.study.lra.pathfinder import GEOMETRY, LONG, TURN, PathfinderConfig, draw, example, render


def raster(points: np.ndarray, size: int, radius: float, fine: int) -> np.ndarray:
    """Return a mask of the fine raster: positions within `radius` of any of the points, (n, 2)."""
    away = np.ones((size * fine, size * fine), bool)
    x, y = np.clip((points * fine).astype(int), 0, size * fine - 1).T
    away[y, x] = False
    return ndimage.distance_transform_edt(away) <= radius * fine


def along(path: np.ndarray) -> np.ndarray:
    """Return closely spaced points on the dashes of a path, (n, 2)."""
    return np.concatenate([np.linspace(begin, end, 60) for begin, end in path])


@pytest.mark.parametrize(("size", "fine", "count"), [(32, 8, 24), (128, 4, 8)])
def test_label_says_whether_the_dots_are_connected(size, fine, count):
    """Lines as wide as a gap close the gaps of a path but do not join two paths; `fine`: raster cells per pixel."""
    config, geometry = PathfinderConfig(size=size), GEOMETRY[size]
    for index in range(count):
        drawing = draw(config, "train", index)
        lines = raster(np.concatenate([along(path) for path in drawing.paths]), size, 0.55 * geometry.gap, fine)
        regions, found = ndimage.label(lines, structure=np.ones((3, 3)))
        assert found == len(drawing.paths)
        (x, y), (u, v) = (drawing.dots * fine).astype(int)
        assert regions[y, x]
        assert regions[v, u]
        assert (regions[y, x] == regions[v, u]) == drawing.label == index % 2


def test_paths_have_the_published_lengths_and_turn_gently():
    for size, geometry in GEOMETRY.items():
        drawing = draw(PathfinderConfig(size=size), "test", 1)
        assert [len(path) for path in drawing.paths] == [LONG, LONG] + [geometry.short] * geometry.distractors
        for path in drawing.paths:
            steps = path[:, 1] - path[:, 0]
            assert np.allclose(np.hypot(*steps.T), geometry.dash)
            assert np.allclose(np.hypot(*(path[1:, 0] - path[:-1, 1]).T), geometry.gap)
            cosines = (steps[1:] * steps[:-1]).sum(1) / geometry.dash**2
            assert (cosines >= np.cos(TURN) - 1e-9).all()
            assert ((path >= geometry.dot) & (path <= size - geometry.dot)).all()


def test_dots_lie_on_ends_of_long_paths():
    for index in range(12):
        drawing = draw(PathfinderConfig(), "train", index)
        owners = []
        for dot in drawing.dots:
            found = [
                number
                for number in (0, 1)
                for end in (drawing.paths[number][0, 0], drawing.paths[number][-1, 1])
                if np.array_equal(dot, end)
            ]
            assert len(found) == 1
            owners += found
        assert (owners[0] == owners[1]) == bool(drawing.label)


def test_picture_contains_only_lines_and_dots():
    drawing = draw(PathfinderConfig(), "train", 0)
    picture = render(drawing, 32)
    middles = np.indices((32, 32)).reshape(2, -1)[::-1].T + 0.5
    lines = np.concatenate([along(path) for path in drawing.paths])
    distance = np.sqrt(np.square(middles[:, None] - lines).sum(-1).min(1)).reshape(32, 32)
    from_dots = np.sqrt(np.square(middles[:, None] - drawing.dots).sum(-1).min(1)).reshape(32, 32)
    assert (picture[(distance > 0.8) & (from_dots > 2.1)] == 0).all()
    assert (picture[distance < 0.2] > 100).all()
    assert (picture[from_dots < 0.9] == 255).all()


def test_example_depends_only_on_split_and_index():
    config = PathfinderConfig()
    (one,), label = example(config, "train", 5)
    assert (len(one), label) == (1024, 1)
    assert np.array_equal(one, example(config, "train", 5)[0][0])
    assert not np.array_equal(one, example(config, "test", 5)[0][0])
