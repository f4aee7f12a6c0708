"""Figures of merit that no host computes."""
