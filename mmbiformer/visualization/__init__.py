"""What a model looks at: recorded while it runs, and drawn."""

from .record import LatentBlock, Record, RoutedBlock, record

__all__ = ['LatentBlock', 'Record', 'RoutedBlock', 'record']
