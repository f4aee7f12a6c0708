"""Schedules of the learning rate."""

from .lagging_cosine import LaggingCosineLR

__all__ = ['LaggingCosineLR']
