"""Redaction: its laws on texts made of address-like pieces, and the readings of the contract."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.clean.redact import PLACEHOLDERS, redact

PIECES = st.sampled_from(
    [
        "a",
        "é",
        "x.y",
        "@",
        ".",
        ":",
        "::",
        " ",
        "\n",
        "-",
        "8.8.8.8",
        "10.0.0.1",
        "1",
        "2001",
        "4860",
        "2600:1f18",
        "db8",
        "mail@example.com",
        ".com",
        ".T",
        "(",
        "[",
        '"',
        "fe80::1",
        "2606:4700::1111",
        "256",
        "/64",
        "<EMAIL>",
        "_",
        "com",
    ]
)
MADE = st.lists(PIECES, max_size=12).map("".join)


@given(MADE | st.text(), st.booleans())
def test_counts_equal_new_placeholders_and_again_changes_nothing(text: str, code: bool) -> None:
    done, counts = redact(text, code=code)
    for name, placeholder in PLACEHOLDERS.items():
        assert done.count(placeholder) - text.count(placeholder) == counts.get(name, 0)
    assert redact(done, code=code) == (done, {})


@given(MADE, st.booleans())
def test_redaction_keeps_lines(text: str, code: bool) -> None:
    assert redact(text, code=code)[0].count("\n") == text.count("\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jane.doe+news@mail.example.co.uk.", "write to <EMAIL>."),
        ("<jöe@exämple.org>,bob@x.io", "<<EMAIL>>,<EMAIL>"),
        ("two: a@b.com and c@d.org", "two: <EMAIL> and <EMAIL>"),
        ("no: a@b, @handle.com, icon@2x.png, a @ b.com", "no: a@b, @handle.com, icon@2x.png, a @ b.com"),
        ("dns 8.8.8.8, not 10.1.2.3 192.168.0.1 127.0.0.1 192.0.2.7 224.0.0.1", None),
        ("1.2.3.4.5 and 999.8.8.8 and v8.8.8.8", "1.2.3.4.5 and 999.8.8.8 and v8.8.8.8"),
        ("at 2001:4860:4860::8888: yes, [2606:4700::1111]:443", "at <IP>: yes, [<IP>]:443"),
        ("not fe80::1 ::1 2001:db8::1 fc00::7 12:30:45", "not fe80::1 ::1 2001:db8::1 fc00::7 12:30:45"),
    ],
)
def test_redact_examples(text: str, expected: str | None) -> None:
    wanted = text.replace("8.8.8.8,", "<IP>,") if expected is None else expected
    assert redact(text)[0] == wanted


def test_code_expressions_stay_and_literals_are_redacted() -> None:
    source = 'y = a@b.mean() + c@d.T + x[2000::3]\nz = a@b.shape\nmail = "joe@corp.com"  # 8.8.4.4, 2a00:1450::5\n'
    done, counts = redact(source, code=True)
    ast.parse(done)
    assert done == 'y = a@b.mean() + c@d.T + x[2000::3]\nz = a@b.shape\nmail = "<EMAIL>"  # <IP>, <IP>\n'
    assert counts == {"email": 1, "ip": 2}


def test_only_the_types_asked_for() -> None:
    assert redact("a@b.com 8.8.8.8", types=("ip",)) == ("a@b.com <IP>", {"ip": 1})


def test_many_at_signs_take_linear_time() -> None:
    redact("a@" * 200_000 + "a." * 200_000)
