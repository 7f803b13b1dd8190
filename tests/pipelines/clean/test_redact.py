"""Redaction: its laws on texts made of address-like pieces, and the readings of the contract."""

from __future__ import annotations

import ast
import sysconfig
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.clean.normalise import normalise_code
from pipelines.clean.redact import PLACEHOLDERS, redact

KEY = "-----BEGIN RSA PRIVATE KEY-----\n" + ("MIIEpAIBAAKCAQEA" * 4 + "\n") * 3 + "-----END RSA PRIVATE KEY-----"
TOKEN = "ghp_" + "a1B2c3" * 6
WEB_TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl"
PIECES = st.sampled_from(
    [
        *(
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
            "+",
            "(",
            ")",
            "[",
            '"',
            "'",
            "<",
            ">",
            "/64",
            "_",
            "com",
        ),
        *("8.8.8.8", "10.0.0.1", "1", "12", "2001", "4860", "2600:1f18", "db8", "fe80::1", "2606:4700::1111", "256"),
        *("mail@example.com", ".com", ".T", "<EMAIL>", "<CARD>", "SECRET", "\\n", "=", "aws_key='"),
        *(
            "+1 718 575 1816",
            "(718) 575-1816",
            "718-575-1816",
            "+442083661177",
            "4111 1111 1111 1111",
            "378282246310005",
        ),
        *("DE89370400440532013000", "GB82 WEST 1234 5698 7654 32", "BE71 0961 2345 6769", "1111", "4111", "ABCD"),
        *(
            TOKEN,
            "AKIAIOSFODNN7EXAMPLE",
            WEB_TOKEN,
            KEY,
            KEY[:40],
            "-----END RSA PRIVATE KEY-----",
            "MIIEpAIBAAKCAQEA" * 3,
        ),
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Call +1 718 575 1816, (718) 575-1816 or 718.575.1816.", "Call <PHONE>, <PHONE> or <PHONE>."),
        ("London +44 (0)20 8366 1177; Bern +41446681800", "London <PHONE>; Bern <PHONE>"),
        ("Clause 252.227-7013, 100-200-3000, +35236450.6, 1.718.575, v718-575-1816, +1 23", None),
        ("pay 4111 1111 1111 1111 or 3782-822463-10005 or 6011111111111117", "pay <CARD> or <CARD> or <CARD>"),
        (
            "no: 4111 1111 1111 1112, 4111-1111 1111-1111, 5191625155316533644, s/4111111111111111, 0.4111111111111111",
            None,
        ),
        ("IBAN DE89 3704 0044 0532 0130 00 THIS, GB82WEST12345698765432", "IBAN <IBAN> THIS, <IBAN>"),
        (
            "no: DE89370400440532013001, DE8937040044053201300, XX893704004405, ABCD DE89 3704 0044 0532 0130 00",
            None,
        ),
        ("key BE12 ACBA DCF6 BD1C A206 67AB CD54 FCE3 D964 BEFB", None),
    ],
)
def test_numbers(text: str, expected: str | None) -> None:
    assert redact(text)[0] == (text if expected is None else expected)


def test_numbers_in_code_must_be_written_not_computed_with() -> None:
    source = "x = 4111111111111111 + 718-575-1816\ny = a +14155552671\nz = '4111111111111111'  # +1 718 575 1816\n"
    done, counts = redact(source, code=True)
    assert done == "x = 4111111111111111 + 718-575-1816\ny = a +14155552671\nz = '<CARD>'  # <PHONE>\n"
    assert counts == {"card": 1, "phone": 1}
    assert redact(source)[1] == {"card": 2, "phone": 3}


@pytest.mark.parametrize(
    "secret",
    [
        TOKEN,
        WEB_TOKEN,
        "AKIAIOSFODNN7EXAMPLE",
        "github_pat_" + "a1" * 11 + "_" + "b" * 59,
        "glpat-" + "a1b2c" * 4,
        "npm_" + "a1" * 18,
        "SG." + "a" * 22 + "." + "b" * 43,
        "xoxb-123456789012-123456789012-abcdefABCDEF",
        "https://hooks.slack.com/services/T00000000/B00000000/abcdef",
        "sq0csp-" + "a" * 43,
        "sk_live_" + "a1" * 12,
        "pypi-AgEIcHlwaS5vcmc" + "a" * 70,
        "sk-ant-api03-" + "a" * 90,
        "sk-proj-" + "a" * 30 + "T3BlbkFJ" + "b" * 30,
        "AIza" + "a" * 35,
        "hf_" + "aB" * 17,
    ],
)
def test_secrets_of_every_format(secret: str) -> None:
    for left, right in (("", ""), ("token = '", "'"), ("(", "),"), ("Authorization: Bearer ", "\n")):
        assert redact(f"{left}{secret}{right}") == (f"{left}<SECRET>{right}", {"secret": 1})


def test_secrets_beside_their_name_leave_the_name() -> None:
    text = f"aws_secret_access_key = '{'aB3/' * 10}'; AccountKey={'a' * 86}==;"
    assert redact(text) == ("aws_secret_access_key = '<SECRET>'; AccountKey=<SECRET>;", {"secret": 2})


def test_words_that_begin_like_secrets_stay() -> None:
    text = "npm_config, xoxo-1, hf_token, AKIA, sk-learn, eyJhbGciOi.not.json, MAKIAIOSFODNN7EXAMPLE0, aws_key = '1'"
    assert redact(text) == (text, {})


def test_private_keys_lose_their_base64_and_nothing_else() -> None:
    assert redact(KEY)[0] == "-----BEGIN RSA PRIVATE KEY-----\n<SECRET>\n\n\n-----END RSA PRIVATE KEY-----"
    escaped = repr(KEY)
    assert ast.literal_eval(redact(escaped, code=True)[0]) == redact(KEY)[0]
    prose = "-----BEGIN PRIVATE KEY----- begins and -----END PRIVATE KEY----- ends a keyThatIsVeryLongIndeed"
    assert redact(prose) == (prose, {})


@pytest.mark.slow
def test_the_standard_library_still_compiles() -> None:
    """Every file that redaction changes keeps its tree, the values of its strings excepted."""
    changed = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            text = normalise_code(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        done, counts = redact(text, code=True)
        if not counts:
            continue
        try:
            before = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        assert shape(ast.parse(done)) == shape(before), path
        compile(done, path.name, "exec")
        changed += 1
    assert changed > 50


def shape(tree: ast.AST) -> list[type[ast.AST]]:
    return [type(node) for node in ast.walk(tree)]


def test_only_the_types_asked_for() -> None:
    assert redact("a@b.com 8.8.8.8", types=("ip",)) == ("a@b.com <IP>", {"ip": 1})


@pytest.mark.parametrize(
    "text",
    [
        "a@" * 200_000 + "a." * 200_000,
        "eyJ" * 200_000 + ".",
        "sk-" * 200_000 + "T3BlbkFJ",
        "+1 (2" * 100_000,
        "4111 " * 100_000,
        "DE89 " * 100_000,
        "1.2" * 200_000,
        "2001:" * 100_000,
        "aws key " * 60_000,
        "-----BEGIN PRIVATE KEY-----" * 20_000,
    ],
    ids=lambda text: text[:6],
)
def test_time_is_linear(text: str) -> None:
    start = time.process_time()
    redact(text, code=False)
    assert time.process_time() - start < 10
