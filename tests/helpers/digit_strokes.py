"""Digits as people draw them, for the pads of the console: strokes of points from 0 to 1, x to the right and y down."""

import math

Stroke = list[tuple[float, float]]


def _arc(middle: tuple[float, float], radius: tuple[float, float], start: int, end: int, steps: int = 8) -> Stroke:
    """Return points of an ellipse between two angles in degrees, clockwise from the right."""
    angles = [math.radians(start + (end - start) * step / steps) for step in range(steps + 1)]
    return [(middle[0] + radius[0] * math.cos(angle), middle[1] + radius[1] * math.sin(angle)) for angle in angles]


STROKES: dict[int, list[Stroke]] = {
    0: [_arc((0.5, 0.5), (0.22, 0.35), -90, 270)],
    1: [[(0.38, 0.28), (0.52, 0.15), (0.52, 0.85)]],
    2: [[*_arc((0.5, 0.33), (0.2, 0.18), -170, 20), (0.32, 0.82), (0.72, 0.82)]],
    3: [_arc((0.47, 0.32), (0.2, 0.17), -150, 90) + _arc((0.47, 0.67), (0.22, 0.18), -90, 150)],
    4: [[(0.55, 0.15), (0.28, 0.6), (0.75, 0.6)], [(0.6, 0.4), (0.6, 0.88)]],
    5: [[(0.68, 0.17), (0.36, 0.17), (0.34, 0.47), *_arc((0.48, 0.64), (0.2, 0.2), -110, 140)]],
    6: [[(0.6, 0.15), (0.42, 0.35)], _arc((0.5, 0.65), (0.19, 0.2), -180, 180)],
    7: [[(0.28, 0.18), (0.72, 0.18), (0.42, 0.85)]],
    8: [_arc((0.5, 0.33), (0.16, 0.16), 90, 450), _arc((0.5, 0.67), (0.19, 0.18), -90, 270)],
    9: [[*_arc((0.5, 0.35), (0.18, 0.18), 0, -360), (0.64, 0.85)]],
}

# Other styles, which a model that has only seen the digits of scikit-learn takes for a 3 and a 9.
WIDE_SEVEN: list[Stroke] = [[(0.3, 0.2), (0.7, 0.2), (0.45, 0.85)]]
OPEN_FOUR: list[Stroke] = [[(0.32, 0.15), (0.3, 0.5), (0.7, 0.5)], [(0.68, 0.15), (0.66, 0.85)]]


def draw(page, digit: int | list[Stroke], left: float = 0, width: float = 1) -> None:
    """Draw a digit or strokes with the mouse on the pad, or on the part of it that begins at `left` (0 to 1)."""
    pad = page.locator(".try-pad")
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    for stroke in STROKES[digit] if isinstance(digit, int) else digit:
        points = [(box["x"] + (left + x * width) * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point)
        page.mouse.up()
