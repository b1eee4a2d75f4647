"""Seven corruptions of square grey images at five levels, computed on demand and reproducible by seed.

Noise, brightness and contrast use the strengths of CIFAR-10-C (Hendrycks & Dietterich 2019), whose images are of
similar size; blur, shift and rotation use our own. Pixels are rounded to multiples of 1/255, as in an image file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter

LEVELS = 5
SHADES = 255
Corruption = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def gaussian_noise(images_NSS: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise to each pixel."""
    return images_NSS + deviation * generator.standard_normal(images_NSS.shape, dtype=np.float32)


def shot_noise(images_NSS: np.ndarray, photons: float, generator: np.random.Generator) -> np.ndarray:
    """Apply Poisson noise with this number of photons per white pixel."""
    return generator.poisson(images_NSS * photons) / photons


def blur(images_NSS: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """Apply a Gaussian blur with this standard deviation in pixels."""
    return np.asarray(gaussian_filter(images_NSS, (0, deviation, deviation)))


def brightness(images_NSS: np.ndarray, more: float, generator: np.random.Generator) -> np.ndarray:
    """Add a constant to each pixel."""
    return images_NSS + more


def contrast(images_NSS: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Scale the distance of each pixel to the image mean."""
    mean_N11 = images_NSS.mean((1, 2), keepdims=True)
    return (images_NSS - mean_N11) * share + mean_N11


def shift(images_NSS: np.ndarray, pixels: float, generator: np.random.Generator) -> np.ndarray:
    """Shift by this number of pixels in a random direction."""
    angle_N = generator.uniform(0, 2 * np.pi, len(images_NSS))
    return _moved(images_NSS, np.zeros(len(images_NSS)), pixels * np.cos(angle_N), pixels * np.sin(angle_N))


def rotation(images_NSS: np.ndarray, degrees: float, generator: np.random.Generator) -> np.ndarray:
    """Rotate by this number of degrees, with random sign."""
    angle_N = np.deg2rad(degrees) * generator.choice([-1, 1], len(images_NSS))
    return _moved(images_NSS, angle_N, np.zeros(len(images_NSS)), np.zeros(len(images_NSS)))


KINDS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian-noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot-noise": (shot_noise, (500, 250, 100, 75, 50)),
    "blur": (blur, (0.4, 0.6, 0.8, 1.0, 1.2)),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "shift": (shift, (0.5, 1.0, 1.5, 2.0, 2.5)),
    "rotation": (rotation, (4, 8, 12, 16, 20)),
}


def corrupt(inputs_ND: np.ndarray, kind: str, level: int, seed: int) -> np.ndarray:
    """Corrupt flat square images in 0..1, float32 `[n, d]`; raises `ValueError` for an unknown kind, level or shape."""
    side = int(inputs_ND.shape[1] ** 0.5)
    if kind not in KINDS or not 1 <= level <= LEVELS:
        raise ValueError(f"corruption {kind!r} at level {level}: there are {', '.join(KINDS)} at levels 1 to {LEVELS}")
    if side**2 != inputs_ND.shape[1]:
        raise ValueError(f"{inputs_ND.shape[1]} pixels are no square image")
    how, strengths = KINDS[kind]
    generator = np.random.default_rng([seed, list(KINDS).index(kind), level])
    found = how(inputs_ND.reshape(-1, side, side), strengths[level - 1], generator)
    return (np.rint(found.clip(0, 1) * SHADES) / SHADES).astype(np.float32).reshape(inputs_ND.shape)


def digest(inputs_ND: np.ndarray) -> str:
    """SHA-256 of images as 8-bit grey values."""
    return hashlib.sha256(np.rint(inputs_ND * SHADES).astype(np.uint8).tobytes()).hexdigest()


def _moved(images_NSS: np.ndarray, angle_N: np.ndarray, right_N: np.ndarray, down_N: np.ndarray) -> np.ndarray:
    import torch
    import torch.nn.functional as F

    cosine_N, sine_N = np.cos(angle_N), np.sin(angle_N)
    half = images_NSS.shape[1] / 2
    rows = np.stack([cosine_N, -sine_N, right_N / half, sine_N, cosine_N, down_N / half], axis=1)
    images = torch.from_numpy(images_NSS).unsqueeze(1)
    grid = F.affine_grid(torch.from_numpy(rows.astype(np.float32)).view(-1, 2, 3), images.shape, align_corners=False)  # type: ignore[arg-type]
    return F.grid_sample(images, grid, align_corners=False)[:, 0].numpy()
