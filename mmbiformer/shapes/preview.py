"""A contact sheet of scenes."""

import cv2
import numpy as np

from .scenes import Scene, tight_box
from .spec import CLASSES


def preview(scene_list: list[Scene], columns: int = 4, zoom: int = 2) -> np.ndarray:
    """A contact sheet of scenes with outlines and class names.

    Args:
        scene_list: Scenes of one size.
        columns: Scenes per row. Defaults to 4.
        zoom: Enlargement. Defaults to 2.

    Returns:
        RGB, uint8, ``(rows * (H * zoom + 4), columns * (W * zoom + 4), 3)``.
    """
    panels = [np.pad(_annotated(scene, zoom), ((2, 2), (2, 2), (0, 0))) for scene in scene_list]
    while len(panels) % columns:
        panels.append(np.zeros_like(panels[0]))
    rows = [panels[k : k + columns] for k in range(0, len(panels), columns)]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def _annotated(scene: Scene, zoom: int) -> np.ndarray:
    """The enlarged image with every visible mask outlined and named."""
    image = cv2.resize(scene.image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    for instance in scene.instances:
        mask = cv2.resize(instance.mask.astype(np.uint8), None, fx=zoom, fy=zoom, interpolation=0)
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, contours, -1, (255, 255, 255), 1)
        x, y = tight_box(instance.mask)[:2]
        place = (x * zoom, max(y * zoom - 3, 10))
        for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.putText(
                image, CLASSES[instance.label], place, 0, 0.4, colour, thickness, cv2.LINE_AA
            )
    return image
