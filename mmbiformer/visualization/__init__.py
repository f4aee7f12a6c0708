"""Routes, attention, agents and latents: recorded while a model runs, and drawn."""

from .record import LatentBlock, Record, RoutedBlock, record

__all__ = ['LatentBlock', 'Record', 'RoutedBlock', 'record']
