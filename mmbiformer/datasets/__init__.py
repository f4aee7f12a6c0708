"""Transforms of data that the host libraries lack; importing this registers them."""

from .loading import LoadImageWithPillow

__all__ = ['LoadImageWithPillow']
