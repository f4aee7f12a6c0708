"""Shared by the files of tools/: options, the runner, the preflight, and how a command ends."""
