"""Redaction of what is made of digits: telephone numbers, payment cards, IBAN.

Phone: international format (a plus sign, ITU-T E.164) and the North American one with its separators, valid by Google's
libphonenumber; other countries' national formats are not told from other numbers and stay. Card: the networks' prefixes
and lengths (ISO/IEC 7812) and the check digit of Luhn. IBAN: the country's length in the registry and the check digits
(ISO 13616; ISO/IEC 7064, mod 97-10).
In code a number must not be one that is computed with: it counts where a quotation mark or a tag is on both sides of
it, or where blanks part it, which no expression can have.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import phonenumbers

PHONE, CARD, IBAN = "<PHONE>", "<CARD>", "<IBAN>"

# A text's characters by class (digit, capital, separator, plus sign), one byte a character: searches that begin with a
# literal string find on it, many times faster than on the text, the few places where a match can begin.
_CLASS_OF = {
    **dict.fromkeys(b"0123456789", b"d"),
    **dict.fromkeys(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"A"),
    **dict.fromkeys(b" -.", b"s"),
    ord("+"): b"+",
}
_CLASSES = b"".join(_CLASS_OF.get(code, b"\0") for code in range(256))
_IBAN_SHAPE = re.compile(rb"AAdd")
_CARD_SHAPE = re.compile(rb"dddds?dddd")
_INTERNATIONAL_SHAPE = re.compile(rb"\+d")
# The last two groups of a North American number; before them stand its area code and what it is written with.
_NORTH_AMERICAN_SHAPE = re.compile(rb"dddsdddd")
_NORTH_AMERICAN_HEAD = 8  # characters: "1 (718) "

_INTERNATIONAL = re.compile(r"(?<![\w.+/(-])\+[1-9][0-9 ().-]{5,20}[0-9](?!\w)")
_LAST_PART = re.compile(r"[ ().-]+[0-9]+$")
_NORTH_AMERICAN = re.compile(
    r"(?<![\w.+/(-])(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?[2-9][0-9]{2}-[0-9]{4}|[2-9][0-9]{2}([.-])[2-9][0-9]{2}\1[0-9]{4})"
    r"(?!\w|[ .-]?[0-9])"
)
# Groups of 4-4-4-4 (Visa, UnionPay and Discover: and 3 more), of American Express (4-6-5) and Diners Club (4-6-4), with
# one separator or none. After a slash such a number is an identifier.
_CARD = re.compile(
    r"(?<![\w.+/-])(?<![0-9] )(?:"
    r"3[47][0-9]{2}([ -]?)[0-9]{6}\1[0-9]{5}"
    r"|3(?:0[0-5]|[68][0-9])[0-9]([ -]?)[0-9]{6}\2[0-9]{4}"
    r"|(?:5[1-5][0-9]{2}|2[2-7][0-9]{2}|35[0-9]{2})([ -]?)[0-9]{4}\3[0-9]{4}\3[0-9]{4}"
    r"|(?:4[0-9]{3}|6(?:011|2[0-9]{2}|4[4-9][0-9]|5[0-9]{2}))([ -]?)[0-9]{4}\4[0-9]{4}\4[0-9]{4}(?:\4[0-9]{3})?"
    r")(?!\w|[ .-]?[0-9])"
)
# A fingerprint of a key in hexadecimal is groups of four as well, but has more of them before or after.
_IBAN = re.compile(r"(?<!\w)(?<![0-9A-F]{4} )[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2}")
_MORE_GROUPS = re.compile(r"\w| [0-9A-F]{4}\b")
_COUNTRIES_BY_LENGTH = {
    15: "NO",
    16: "BE",
    18: "DK FI FK FO GL NL SD",
    19: "MK SI",
    20: "AT BA EE KZ LT LU MN XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
    29: "BR EG PS QA UA",
    30: "JO KW MU YE",
    31: "MT SC",
    32: "LC",
    33: "RU",
}
# SWIFT's registry of IBAN formats: characters by country.
IBAN_LENGTHS = {country: length for length, group in _COUNTRIES_BY_LENGTH.items() for country in group.split()}

Sure = Callable[[re.Match[str]], int | None]


def redact_phones(text: str, code: bool) -> tuple[str, int]:
    """The text with every telephone number replaced, and their number."""
    starts = _starts(text, _INTERNATIONAL_SHAPE)
    text, international = _replace(text, starts, _INTERNATIONAL, PHONE, _phone_end, code)
    starts = [
        at for core in _starts(text, _NORTH_AMERICAN_SHAPE) for at in range(max(0, core - _NORTH_AMERICAN_HEAD), core)
    ]
    text, north_american = _replace(text, starts, _NORTH_AMERICAN, PHONE, _north_american_end, code)
    return text, international + north_american


def redact_cards(text: str, code: bool) -> tuple[str, int]:
    """The text with every payment card's number replaced, and their number."""
    return _replace(text, _starts(text, _CARD_SHAPE), _CARD, CARD, _card_end, code)


def redact_ibans(text: str, code: bool) -> tuple[str, int]:
    """The text with every IBAN replaced, and their number."""
    return _replace(text, _starts(text, _IBAN_SHAPE), _IBAN, IBAN, _iban_end, code)


def has_luhn_digit(number: str) -> bool:
    """Whether the digits of a number, other characters left out, end in their check digit (ISO/IEC 7812-1, annex B)."""
    digits = [int(c) for c in reversed(number) if c.isdigit()]
    return (sum(digits[::2]) + sum(sum(divmod(2 * d, 10)) for d in digits[1::2])) % 10 == 0


def has_iban_digits(iban: str) -> bool:
    """Whether the check digits of an IBAN without blanks are right (ISO/IEC 7064, mod 97-10)."""
    return int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97 == 1


@functools.lru_cache(maxsize=1)
def _classes(text: str) -> bytes:
    return text.encode("ascii", "replace").translate(_CLASSES)


def _starts(text: str, shape: re.Pattern[bytes]) -> list[int]:
    return [m.start() for m in shape.finditer(_classes(text))]


def _replace(
    text: str, starts: Sequence[int], pattern: re.Pattern[str], placeholder: str, end_of: Sure, code: bool
) -> tuple[str, int]:
    """Replace what matches from a start, ascending, to where ``end_of`` says, None for none."""
    pieces: list[str] = []
    done = 0
    for start in starts:
        match = pattern.match(text, start) if start >= done else None
        end = end_of(match) if match else None
        if end is None or (code and not _is_written(text, start, end)):
            continue
        pieces += (text[done:start], placeholder)
        done = end
    return "".join(pieces) + text[done:], len(pieces) // 2


def _is_written(text: str, start: int, end: int) -> bool:
    around = text[start - 1 : start] + text[end : end + 1]
    return around in ("''", '""', "``", "><") or " " in text[start:end]


def _phone_end(match: re.Match[str]) -> int | None:
    """A number may be followed by another: parts are taken off until what is left is one."""
    number = match.group()
    # One full stop is a decimal point.
    while number.count(".") != 1:
        if _is_phone(number, None):
            return match.start() + len(number)
        shorter = _LAST_PART.sub("", number)
        if shorter == number:
            return None
        number = shorter
    return None


def _card_end(match: re.Match[str]) -> int | None:
    return match.end() if has_luhn_digit(match.group()) else None


def _north_american_end(match: re.Match[str]) -> int | None:
    return match.end() if _is_phone(match.group(), "US") else None


def _is_phone(number: str, region: str | None) -> bool:
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(number, region))
    except phonenumbers.NumberParseException:
        return False


def _iban_end(match: re.Match[str]) -> int | None:
    length = IBAN_LENGTHS.get(match.group()[:2])
    if length is None:
        return None
    text, start = match.string, match.start()
    blanks = (length - 1) // 4 if text[start + 4] == " " else 0
    written = text[start : start + length + blanks]
    groups = written.split(" ") if blanks else [written]
    iban = "".join(groups)
    if len(iban) != length or not (iban.isascii() and iban.isalnum() and iban.isupper()):
        return None
    if blanks and any(len(group) != 4 for group in groups[:-1]):
        return None
    end = start + len(written)
    return None if _MORE_GROUPS.match(text, end) or not has_iban_digits(iban) else end
