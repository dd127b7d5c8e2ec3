"""The camera: RGB and metric depth by casting one ray a pixel with `mujoco.mj_multiRay`. No OpenGL, deterministic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

OBSERVATION_SIZE = 48
POSITION = (0.0, -0.40, 0.50)
LOOK_AT = (0.0, 0.02, 0.0)
FIELD_DEGREES = 43.0
NO_HIT = 0.0
_LAMP = (-0.3, -0.5, 0.8)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera. position, look_at: metres.   field_degrees: vertical and horizontal field of view.   size: pixels."""

    position: tuple[float, float, float] = POSITION
    look_at: tuple[float, float, float] = LOOK_AT
    field_degrees: float = FIELD_DEGREES
    size: int = OBSERVATION_SIZE

    def shifted(self, shift) -> "Camera":
        """The same camera with its position moved by `shift` metres, still looking at the same point."""
        moved = tuple(float(p + s) for p, s in zip(self.position, shift))
        return Camera(moved, self.look_at, self.field_degrees, self.size)


STUDIO = Camera(position=(0.42, -0.52, 0.46), look_at=(0.0, 0.04, 0.08), field_degrees=46.0, size=256)


def _axes(camera: Camera):
    """Position (3,), and the unit vectors (3,) forward, right and up of the camera."""
    position, target = np.array(camera.position), np.array(camera.look_at)
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    return position, forward, right, np.cross(right, forward)


@lru_cache(maxsize=256)
def _rays(camera: Camera):
    """Unit ray directions (pixels, 3) float64 and each ray's share along the optical axis (pixels,)."""
    _, forward, right, up = _axes(camera)
    half = np.tan(np.radians(camera.field_degrees) / 2)
    steps = ((np.arange(camera.size) + 0.5) / camera.size * 2 - 1) * half
    grid = forward + steps[None, :, None] * right - steps[:, None, None] * up
    rays = grid.reshape(-1, 3)
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    return np.ascontiguousarray(rays), rays @ forward


def pixels_of(points, camera: Camera = Camera()) -> np.ndarray:
    """Where points of the world appear: (N, 3) metres  ->  (N, 2) column and row, in pixels from the upper left corner."""
    position, forward, right, up = _axes(camera)
    offset = np.asarray(points, float) - position
    half = np.tan(np.radians(camera.field_degrees) / 2)
    across, upward = offset @ right / (offset @ forward), offset @ up / (offset @ forward)
    return np.stack([across / half + 1, 1 - upward / half], axis=-1) * camera.size / 2


def photograph(model, data, rgb, camera: Camera = Camera(), light: float = 1.0, light_direction: float = 0.0):
    """Cast the rays.   rgb: (geoms + 1, 3) colours, the last row for rays that hit nothing.

    Returns (size, size, 3) uint8 with Lambert shading, and (size, size) float32 depth along the optical axis in metres (0: no hit).
    """
    import mujoco

    rays, along = _rays(camera)
    count = len(rays)
    geom = np.empty(count, np.int32)
    distance = np.empty(count)
    normal = np.empty((count, 3))
    mujoco.mj_multiRay(model, data, np.array(camera.position), rays.ravel(), None, 1, -1, geom, distance, normal.ravel(), count, 10.0)
    x, y, z = _LAMP
    c, s = np.cos(light_direction), np.sin(light_direction)
    lamp = np.array([c * x - s * y, s * x + c * y, z]) / np.linalg.norm(_LAMP)
    shade = (0.45 + 0.55 * np.maximum(normal @ lamp, 0.0)) * light
    shade[geom < 0] = light
    image = np.clip(rgb[geom] * shade[:, None] * 255.0, 0, 255).astype(np.uint8)
    depth = np.where(geom >= 0, distance * along, NO_HIT).astype(np.float32)
    shape = (camera.size, camera.size)
    return image.reshape(*shape, 3), depth.reshape(shape)
