"""Transforms of data that the host libraries lack; importing this registers them."""

from .corrupt import Corrupt
from .loading import LoadImageWithPillow
from .token_labels import CropLabelMap, LoadLabelMap, MoveLabelMap

__all__ = ['Corrupt', 'CropLabelMap', 'LoadImageWithPillow', 'LoadLabelMap', 'MoveLabelMap']
