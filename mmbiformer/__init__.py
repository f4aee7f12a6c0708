"""BiFormer and its bi-level routing attention for MMDetection, MMSegmentation and MMPretrain."""

__version__ = '0.1.0'
