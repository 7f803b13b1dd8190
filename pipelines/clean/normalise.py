"""Normalisation of a document's characters: what leaves in silver and what stays.

Prose: byte order marks and control characters are removed, every line terminator becomes LF, and the rest is NFC.
Code: byte order marks, NUL and the control characters that are no white space are removed and CRLF becomes LF; nothing
else is touched, because its white space and its exact characters carry meaning.
Not here: e-mail addresses and the like (``redact``), and anything that would drop a visible character.
"""

from __future__ import annotations

import re
import unicodedata

# Unicode Standard Annex 14, mandatory breaks; a vertical tab or form feed between two words must not join them.
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_PROSE_DROPPED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")
_CODE_DROPPED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
# A run of CR before LF is a file converted twice; taking one only would make the result depend on how often it is done.
_CODE_LINE_ENDS = re.compile("\r+\n")


def normalise_prose(text: str) -> str:
    """Prose without controls and byte order marks, with LF line ends, in NFC. Idempotent."""
    # NFC comes last: removing a control can bring a letter and its combining mark together.
    text = _LINE_ENDS.sub("\n", _PROSE_DROPPED.sub("", text))
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def normalise_code(text: str) -> str:
    """Code without controls and byte order marks, with LF for CRLF; tabs, form feeds and lone CR stay. Idempotent."""
    text = _CODE_DROPPED.sub("", text)
    return _CODE_LINE_ENDS.sub("\n", text) if "\r" in text else text


def normalise(text: str, kind: str) -> str:
    """The document's text as its kind (``text`` or ``code``) asks."""
    return normalise_code(text) if kind == "code" else normalise_prose(text)
