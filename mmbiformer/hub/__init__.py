"""Doors for users of other libraries: import the module named like the library."""
