"""Licences: found in a file, named by a LICENSE text, and classed for the policy.

A file's own ``SPDX-License-Identifier`` line (SPDX 2.3, annex E) comes first, then the nearest LICENSE file, then what
the source declares. A LICENSE text is known by a phrase that only that licence has; the first phrase in the text
decides, because bundled licences follow the project's own. Of an expression, OR takes the more permissive side and AND
the less; an exception (WITH) leaves the class as it is. Not here: matching whole texts against SPDX's templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

HEAD_CHARACTERS = 8192
# From the most to the least permissive; what no list names is unknown.
ORDER = ("permissive", "copyleft", "unknown")
LICENSE_FILE = r"(?i)^(?:license|licence|copying|unlicense)(?:[-.](?:txt|md|rst|[a-z0-9-]+))?$"

_TAG = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+() \t-]+)")
_TOKEN = re.compile(r"[()]|[A-Za-z0-9.+-]+")
_IDENTIFIER = re.compile(r"^[A-Za-z0-9][A-Za-z0-9.-]*\+?$")
_PHRASES = (
    ("Apache-2.0", r"Apache License,?\s+Version 2\.0"),
    ("AGPL-3.0-only", r"GNU AFFERO GENERAL PUBLIC LICENSE\s+Version 3"),
    ("LGPL-3.0-only", r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 3"),
    ("LGPL-2.1-only", r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 2\.1"),
    ("LGPL-2.0-only", r"GNU LIBRARY GENERAL PUBLIC LICENSE\s+Version 2"),
    ("GPL-3.0-only", r"GNU GENERAL PUBLIC LICENSE\s+Version 3"),
    ("GPL-2.0-only", r"GNU GENERAL PUBLIC LICENSE\s+Version 2"),
    ("MPL-2.0", r"Mozilla Public License,?\s+Version 2\.0|Mozilla Public License Version 2\.0"),
    ("EPL-2.0", r"Eclipse Public License - v 2\.0"),
    ("Python-2.0", r"PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2"),
    ("BSL-1.0", r"Boost Software License - Version 1\.0"),
    ("Unlicense", r"This is free and unencumbered software released into the public domain"),
    ("CC0-1.0", r"CC0 1\.0 Universal"),
    ("CC-BY-SA-4.0", r"Creative Commons Attribution-ShareAlike 4\.0"),
    ("CC-BY-4.0", r"Creative Commons Attribution 4\.0 International"),
    (
        "ISC",
        r"Permission to use, copy, modify, and(?:/or)? distribute this software for any\s+purpose with or without fee",
    ),
    ("Zlib", r"This software is provided 'as-is', without any express or implied\s+warranty"),
    ("MIT", r"Permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("BSD-3-Clause", r"Redistribution and use in source and binary forms"),
)
_LICENSE_TEXT = re.compile("|".join(f"(?P<L{i}>{p})" for i, (_, p) in enumerate(_PHRASES)), re.IGNORECASE)
_NO_ENDORSEMENT = re.compile(r"endorse\s+or\s+promote\s+products", re.IGNORECASE)


def spdx_tag(text: str) -> str | None:
    """The licence expression of a file's own SPDX line; None without one that parses."""
    head = text[:HEAD_CHARACTERS]
    if "SPDX-License-Identifier:" not in head or not (found := _TAG.search(head)):
        return None
    return canonical(found.group(1).strip(" \t-"))


def of_license_text(text: str) -> str | None:
    """The SPDX identifier of a LICENSE file's text; None when no phrase is known."""
    if tag := spdx_tag(text):
        return tag
    found = _LICENSE_TEXT.search(re.sub(r"\s+", " ", text))
    if found is None or found.lastgroup is None:
        return None
    name = _PHRASES[int(found.lastgroup[1:])][0]
    # The two BSD licences differ in the clause against endorsement.
    return "BSD-2-Clause" if name == "BSD-3-Clause" and not _NO_ENDORSEMENT.search(text) else name


def canonical(expression: str) -> str | None:
    """The expression with single spaces and upper-case operators; None when it is none."""
    tokens = [t.upper() if t.upper() in ("AND", "OR", "WITH") else t for t in _TOKEN.findall(expression)]
    text = " ".join(tokens).replace("( ", "(").replace(" )", ")")
    return text if tokens and _class(tokens, {}) is not None else None


def license_class(expression: str | None, classes: Mapping[str, Sequence[str]]) -> str:
    """permissive, copyleft or unknown. classes: SPDX identifiers, without -only and -or-later, by class."""
    if not expression:
        return "unknown"
    known = {name.lower(): group for group, names in classes.items() for name in names}
    return _class(_TOKEN.findall(expression), known) or "unknown"


def _class(tokens: list[str], known: Mapping[str, str]) -> str | None:
    """The class of a tokenised expression; None when it does not parse. OR binds weaker than AND, AND than WITH."""
    rest = list(tokens)

    def operator(name: str) -> bool:
        if rest and rest[0].upper() == name:
            rest.pop(0)
            return True
        return False

    def simple() -> str | None:
        if operator("("):
            inner = either()
            return inner if operator(")") else None
        if not rest or not _IDENTIFIER.match(rest[0]) or rest[0].upper() in ("AND", "OR", "WITH"):
            return None
        name = re.sub(r"(?:\+|-only|-or-later)$", "", rest.pop(0).lower())
        if operator("WITH"):
            if not rest or not _IDENTIFIER.match(rest[0]):
                return None
            rest.pop(0)
        return known.get(name, "unknown")

    def both() -> str | None:
        found = simple()
        while found is not None and operator("AND"):
            other = simple()
            found = None if other is None else max(found, other, key=ORDER.index)
        return found

    def either() -> str | None:
        found = both()
        while found is not None and operator("OR"):
            other = both()
            found = None if other is None else min(found, other, key=ORDER.index)
        return found

    result = either()
    return result if not rest else None
