"""Errors that this project raises on purpose.

Run as a command, a :class:`UserError` alone is shown without its traceback.
"""

import unicodedata

_BIDIRECTIONAL = '\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069'


class UserError(Exception):
    """The user must mend something; the message says what was given, what is needed, what to do."""


class CheckpointError(UserError, ValueError):
    """A file holds no checkpoint, a damaged one, or one of another model."""


class WriteError(UserError, OSError):
    """A file cannot be written."""


def escaped(text: str) -> str:
    """Replace the characters of a text that a terminal would obey.

    Args:
        text: Any text, such as names from a file. Line breaks stay.

    Returns:
        str: The text, with such characters as escape sequences.
    """
    return ''.join(
        ascii(letter)[1:-1] if letter != '\n' and controls_terminal(letter) else letter
        for letter in text
    )


def controls_terminal(text: str) -> bool:
    """Whether a text has characters that a terminal would obey, or that cannot be encoded."""
    return any(
        unicodedata.category(letter) in ('Cc', 'Cs') or letter in _BIDIRECTIONAL for letter in text
    )
