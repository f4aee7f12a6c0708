"""The arithmetic of ImageNet-C (arXiv 1903.12261) and COCO-C (arXiv 1907.07484)."""

from collections.abc import Mapping
from statistics import fmean

GROUPS = {
    'noise': ('gaussian_noise', 'shot_noise', 'impulse_noise'),
    'blur': ('defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur'),
    'weather': ('snow', 'frost', 'fog', 'brightness'),
    'digital': ('contrast', 'elastic_transform', 'pixelate', 'jpeg_compression'),
}
CORRUPTIONS = tuple(name for group in GROUPS.values() for name in group)
"""The fifteen of the benchmark."""
SEVERITIES = 1, 2, 3, 4, 5

ALEXNET = dict(
    gaussian_noise=0.886428,
    shot_noise=0.894468,
    impulse_noise=0.922640,
    defocus_blur=0.819880,
    glass_blur=0.826268,
    motion_blur=0.785948,
    zoom_blur=0.798360,
    snow=0.866816,
    frost=0.826572,
    fog=0.819324,
    brightness=0.564592,
    contrast=0.853204,
    elastic_transform=0.646056,
    pixelate=0.717840,
    jpeg_compression=0.606500,
)
"""Top-1 errors of AlexNet, means over the severities, as ImageNet-C's authors give them."""
ALEXNET_CLEAN = 0.43478
"""Its top-1 error on ImageNet's validation images."""

Table = Mapping[str, Mapping[int, float]]
"""A number by corruption and severity."""


def is_complete(row: Mapping[int, float]) -> bool:
    """Whether there is a number for each severity."""
    return {*row} == {*SEVERITIES}


def corruption_errors(errors: Table, clean: float | None = None) -> dict[str, float]:
    """Compare errors with AlexNet's, corruption by corruption.

    Args:
        errors: Top-1 errors, from 0 to 1.
        clean: The top-1 error without corruption, for what corruptions add to it. Defaults to None:
            the errors as they are.

    Returns:
        dict[str, float]: In percent of AlexNet's: the corruption errors, or with ``clean`` the
        relative ones. Corruptions of which a severity is missing, or AlexNet's error, are left out.
    """
    own, alexnet = (0, 0) if clean is None else (clean, ALEXNET_CLEAN)
    return {
        name: 100 * (fmean(row.values()) - own) / (ALEXNET[name] - alexnet)
        for name, row in errors.items()
        if name in ALEXNET and is_complete(row)
    }


def mean_corruption_error(errors: Table, clean: float | None = None) -> float | None:
    """mCE, or relative mCE with ``clean``, in percent; None unless all fifteen are complete."""
    found = corruption_errors(errors, clean)
    return fmean(found.values()) if len(found) == len(CORRUPTIONS) else None


def mean_performance(results: Table) -> float | None:
    """mPC: the mean of a metric over corruptions and severities.

    None unless at least one corruption is there, and all have the same severities.
    """
    rows = [row for name, row in results.items() if name in CORRUPTIONS]
    if not rows or not rows[0] or any({*row} != {*rows[0]} for row in rows):
        return None
    return fmean(value for row in rows for value in row.values())
