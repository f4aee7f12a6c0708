"""Transforms of data that the host libraries lack; importing this registers them."""

from .loading import LoadImageWithPillow
from .token_labels import CropLabelMap, LoadLabelMap, MoveLabelMap

__all__ = ['CropLabelMap', 'LoadImageWithPillow', 'LoadLabelMap', 'MoveLabelMap']
