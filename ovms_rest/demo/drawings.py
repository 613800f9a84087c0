"""Digits drawn with lines, as people draw them on the console's pad, to train the demo model on.

A drawing is a list of strokes, each an array of points [n,2] (x to the right, y down). Each digit has a few styles; a
drawing is one of them, bent, turned and scaled at random, and rendered as console/pad.js does it for images of 8x8.
"""

from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Images = NDArray[np.float32]

SIZE = 8
FINE = 32  # pixels drawn along each pixel of the image
# What pad.js calls the style of images of this size, as shares of their side.
INK = 0.34
THINNEST = 0.15
THICKEST = 0.3
WAVES = 0.7  # of the curve that bends a drawing, along its height and width


def _line(*points: tuple[float, float]) -> Points:
    """Return points along straight lines, close enough together to be bent."""
    parts = [np.linspace(start, end, 6) for start, end in pairwise(points)]
    return np.concatenate(parts)


def _arc(x: float, y: float, width: float, height: float, start: float, end: float) -> Points:
    """Return points of an ellipse of half axes between two angles in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, end, 16))
    return np.stack([x + width * np.cos(angles), y + height * np.sin(angles)], axis=1)


def _join(*parts: Points) -> list[Points]:
    """Return one stroke."""
    return [np.concatenate(parts)]


STYLES: dict[int, list[list[Points]]] = {
    0: [
        [_arc(0.5, 0.5, 0.22, 0.35, -90, 270)],
        [_arc(0.5, 0.5, 0.33, 0.35, -60, 300)],
        [_arc(0.5, 0.5, 0.26, 0.35, -110, 235)],
    ],
    1: [
        [_line((0.5, 0.15), (0.5, 0.85))],
        [_line((0.38, 0.28), (0.52, 0.15), (0.52, 0.85))],
        [_line((0.3, 0.42), (0.52, 0.15), (0.52, 0.85))],
        [_line((0.36, 0.28), (0.52, 0.15), (0.52, 0.85)), _line((0.34, 0.85), (0.7, 0.85))],
    ],
    2: [
        _join(_arc(0.5, 0.33, 0.2, 0.18, -170, 20), _line((0.66, 0.42), (0.32, 0.84), (0.72, 0.84))),
        _join(
            _arc(0.5, 0.34, 0.22, 0.19, -160, 40),
            _arc(0.4, 0.76, 0.09, 0.08, 60, 320),
            _line((0.48, 0.75), (0.76, 0.85)),
        ),
    ],
    3: [
        _join(_arc(0.47, 0.32, 0.2, 0.17, -150, 90), _arc(0.47, 0.67, 0.22, 0.18, -90, 150)),
        _join(_line((0.3, 0.15), (0.68, 0.15), (0.47, 0.42)), _arc(0.46, 0.63, 0.23, 0.21, -90, 150)),
    ],
    4: [
        [_line((0.55, 0.15), (0.28, 0.6), (0.75, 0.6)), _line((0.6, 0.4), (0.6, 0.88))],
        [_line((0.6, 0.88), (0.6, 0.15), (0.28, 0.62), (0.76, 0.62))],
        [_line((0.36, 0.15), (0.3, 0.55), (0.74, 0.55)), _line((0.66, 0.15), (0.64, 0.87))],
        [_line((0.38, 0.15), (0.28, 0.52), (0.74, 0.52)), _line((0.6, 0.32), (0.58, 0.87))],
        [_line((0.3, 0.15), (0.3, 0.5), (0.68, 0.5)), _line((0.68, 0.15), (0.68, 0.85))],
    ],
    5: [
        _join(_line((0.68, 0.17), (0.36, 0.17), (0.34, 0.47)), _arc(0.48, 0.64, 0.2, 0.2, -110, 140)),
        _join(_arc(0.6, 0.36, 0.26, 0.2, -70, -180), _arc(0.45, 0.65, 0.23, 0.2, -75, 130)),
        [
            *_join(_line((0.38, 0.17), (0.34, 0.45)), _arc(0.46, 0.64, 0.22, 0.21, -120, 150)),
            _line((0.38, 0.16), (0.74, 0.15)),
        ],
    ],
    6: [
        _join(_line((0.6, 0.15), (0.42, 0.38)), _arc(0.5, 0.65, 0.19, 0.2, -180, -540)),
        _join(_arc(0.64, 0.55, 0.34, 0.4, -95, -190), _arc(0.5, 0.66, 0.2, 0.19, -190, -540)),
        _join(_line((0.34, 0.15), (0.32, 0.62)), _arc(0.5, 0.66, 0.18, 0.19, 180, -170)),
    ],
    7: [
        [_line((0.28, 0.18), (0.72, 0.18), (0.42, 0.85))],
        [_line((0.28, 0.18), (0.72, 0.18), (0.46, 0.85)), _line((0.38, 0.52), (0.72, 0.52))],
        [_line((0.28, 0.3), (0.28, 0.18), (0.72, 0.18), (0.44, 0.85))],
        _join(_line((0.28, 0.18), (0.7, 0.18)), _arc(0.84, 0.85, 0.38, 0.6, -112, -180)),
    ],
    8: [
        [_arc(0.5, 0.33, 0.16, 0.16, 90, 450), _arc(0.5, 0.67, 0.19, 0.18, -90, 270)],
        _join(
            _arc(0.5, 0.32, 0.18, 0.17, -20, -230),
            _line((0.4, 0.45), (0.6, 0.55)),
            _arc(0.5, 0.68, 0.2, 0.17, -40, 210),
            _line((0.36, 0.6), (0.66, 0.36)),
        ),
    ],
    9: [
        _join(_arc(0.5, 0.35, 0.18, 0.18, 0, -360), _line((0.68, 0.35), (0.64, 0.85))),
        _join(_arc(0.5, 0.35, 0.19, 0.19, -20, -360), _arc(0.36, 0.5, 0.33, 0.36, -20, 80)),
        _join(
            _arc(0.5, 0.34, 0.19, 0.19, -30, -350),
            _line((0.68, 0.3), (0.68, 0.68)),
            _arc(0.5, 0.68, 0.18, 0.17, 0, 140),
        ),
    ],
}


def draw(count: int, seed: int, varied: bool = False) -> tuple[Images, NDArray[np.int64]]:
    """Return drawings [n,8,8,1], white on black from 0 to 255, and their digits [n], `count` of each.

    If `varied`, the width of the lines and the extent of the drawing differ from those that pad.js makes.
    """
    random = np.random.default_rng(seed)
    digits = np.repeat(np.arange(10), count)
    images = np.empty((len(digits), SIZE, SIZE, 1), np.float32)
    for image, digit in zip(images, digits, strict=True):
        styles = STYLES[int(digit)]
        strokes = distort(styles[random.integers(len(styles))], random)
        ink, fill = (random.uniform(0.2, 0.4), random.uniform(0.85, 1)) if varied else (INK, 1.0)
        image[..., 0] = render(strokes, ink, fill, THINNEST * min(ink / INK, 1))
    return images, digits


def distort(strokes: list[Points], random: np.random.Generator) -> list[Points]:
    """Bend, jitter, stretch, slant and turn strokes."""
    bends = random.normal(0, 0.045, 2)
    phases = random.uniform(0, 2 * np.pi, 2)
    angle = np.radians(random.uniform(-12, 12))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.array([[random.uniform(0.75, 1.3), random.uniform(-0.25, 0.2)], [0, 1]])
    distorted = []
    for stroke in strokes:
        points = stroke + random.normal(0, 0.012, 2) + random.normal(0, 0.008, stroke.shape)
        points += bends * np.sin(WAVES * 2 * np.pi * points[:, ::-1] + phases)  # x by y, and y by x
        distorted.append(points @ (turn @ slant).T)
    return distorted


def render(strokes: list[Points], ink: float = INK, fill: float = 1, thinnest: float = THINNEST) -> Images:
    """Return strokes, centred and scaled, as grey levels [8,8] from 0 to 255, as `renderLevels` of pad.js does."""
    points = np.concatenate(strokes)
    low, high = points.min(axis=0), points.max(axis=0)
    extent = float((high - low).max())
    length = sum(float(np.hypot(*np.diff(stroke, axis=0).T).sum()) for stroke in strokes)
    pen, scale = thinnest, 1.0  # as shares of the side
    for _ in range(4):
        scale = max(fill - pen, 0) / extent if extent else 1
        pen = min(max(ink / (length * scale + pen), thinnest), THICKEST)
    side = SIZE * FINE
    canvas: NDArray[Any] = np.zeros((side, side), np.uint8)
    for stroke in strokes:
        # OpenCV counts from the middle of the first pixel, in 16ths here, and draws lines a pixel wider than asked for
        placed = (0.5 + (stroke - (low + high) / 2) * scale) * side - 0.5
        cv2.polylines(canvas, [np.rint(placed * 16).astype(np.int32)], False, 255, round(pen * side) - 1, shift=4)
    levels: Images = canvas.reshape(SIZE, FINE, SIZE, FINE).mean(axis=(1, 3), dtype=np.float32)
    return levels
