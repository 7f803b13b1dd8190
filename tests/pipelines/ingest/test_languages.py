"""Language, kind and media type by name and shebang."""

from __future__ import annotations

import pytest

from pipelines.ingest.languages import code_language, detect, extension


@pytest.mark.parametrize(
    ("name", "line", "language", "kind"),
    [
        ("src/a.PY", "", "python", "code"),
        ("lib/x.hpp", "", "c++", "code"),
        ("CMakeLists.txt", "", "cmake", "code"),
        ("deploy/Dockerfile", "", "dockerfile", "code"),
        ("index.html", "", "html", "code"),
        ("data.csv", "", "csv", "code"),
        ("README.md", "", "markdown", "text"),
        ("guide.rst", "", "restructuredtext", "text"),
        ("README", "", "text", "text"),
        ("LICENSE", "", "text", "text"),
        ("notes.unknown", "#!/bin/sh", "text", "text"),
        (".bashrc", "", "shell", "code"),
        ("run", "#!/usr/bin/env -S python3.11 -u", "python", "code"),
        ("run", "#!/bin/bash -e", "shell", "code"),
        ("run", "#! /usr/local/bin/ruby2.7", "ruby", "code"),
        ("run", "#!/usr/bin/env FOO=1 node", "javascript", "code"),
        ("run", "#!/opt/thing", "text", "text"),
        ("run", "no shebang", "text", "text"),
    ],
)
def test_language_by_name_and_shebang(name: str, line: str, language: str, kind: str) -> None:
    found = detect(name, line)
    assert (found.name, found.kind) == (language, kind)
    assert "/" in found.media_type
    assert code_language(name, line + "\nrest") == (language if kind == "code" else None)


@pytest.mark.parametrize(
    ("name", "wanted"), [("a.tar.GZ", ".gz"), (".bashrc", ""), ("x.", ""), ("d.d/x", ""), ("...", ""), (".a.py", ".py")]
)
def test_extension_of_a_name(name: str, wanted: str) -> None:
    assert extension(name) == wanted
