"""Weights in files: read them safely, know their names, fit them to models.

Importing it registers the reader with MMEngine, for local files and http(s).
"""

from .loader import register

register()
