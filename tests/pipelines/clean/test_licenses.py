"""Licences: the SPDX line, LICENSE texts, and the class of an expression."""

from __future__ import annotations

import pytest

from pipelines.clean.config import CleanConfig
from pipelines.clean.licenses import canonical, license_class, of_license_text, spdx_tag


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# SPDX-License-Identifier: MIT\nx", "MIT"),
        ("/* SPDX-License-Identifier: (GPL-2.0-only or  MIT) */", "(GPL-2.0-only OR MIT)"),
        ("<!-- SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception -->", "Apache-2.0 WITH LLVM-exception"),
        ("# SPDX-License-Identifier: see the file\n", None),
        ("nothing", None),
    ],
)
def test_spdx_line(text: str, expected: str | None) -> None:
    assert spdx_tag(text) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", "permissive"),
        ("mit", "permissive"),
        ("GPL-3.0-or-later", "copyleft"),
        ("GPL-2.0+", "copyleft"),
        ("MIT OR GPL-2.0-only", "permissive"),
        ("MIT AND GPL-2.0-only", "copyleft"),
        ("MIT AND (GPL-2.0-only OR Apache-2.0)", "permissive"),
        ("GPL-2.0-only WITH Classpath-exception-2.0", "copyleft"),
        ("MPL-2.0", "copyleft"),
        ("CC-BY-SA-4.0", "copyleft"),
        ("CC-BY-NC-4.0", "unknown"),
        ("CC-BY-ND-4.0 OR LicenseRef-x", "unknown"),
        ("MIT AND", "unknown"),
        ("Copyright 2020 by me", "unknown"),
        (None, "unknown"),
    ],
)
def test_license_class(expression: str | None, expected: str) -> None:
    assert license_class(expression, CleanConfig().license_classes) == expected


def test_license_texts() -> None:
    assert (
        of_license_text("MIT License\n\nPermission is hereby granted, free of\ncharge, to any person obtaining a copy")
        == "MIT"
    )
    assert of_license_text("   Apache License\n     Version 2.0, January 2004") == "Apache-2.0"
    assert of_license_text("GNU GENERAL PUBLIC LICENSE\n  Version 3, 29 June 2007") == "GPL-3.0-only"
    bsd = "Redistribution and use in source and binary forms, with or without"
    assert of_license_text(bsd) == "BSD-2-Clause"
    assert of_license_text(bsd + " ... to endorse or\npromote products") == "BSD-3-Clause"
    assert of_license_text("All rights reserved.") is None
    assert canonical("") is None
