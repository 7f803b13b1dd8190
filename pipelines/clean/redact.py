"""Redaction of personal data and secrets by typed placeholders.

E-mail addresses and public IP addresses are found here, what is made of digits in ``numbers``, secrets in
``credentials``. The placeholders, ``<EMAIL>`` and the like, hold no quote, backslash or line end, so they are valid in
a string literal of every common language, and nothing that any type looks for. Addresses that are private, reserved, of
multicast or for documentation stay (RFC 6890, as ``ipaddress`` has it); example domains count as e-mail. In code a
match must not look like an expression: an attribute after a matrix product (``a@b.mean()``, ``q@k.mT``) and a slice
(``x[2000::3]``) stay.
Left out: names, postal addresses and identity numbers of countries, which no pattern tells from other text.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence

from pipelines.clean.credentials import SECRET, redact_secrets
from pipelines.clean.numbers import CARD, IBAN, PHONE, redact_cards, redact_ibans, redact_phones

PLACEHOLDERS = {
    "secret": SECRET,
    "email": "<EMAIL>",
    "iban": IBAN,
    "card": CARD,
    "phone": PHONE,
    "ip": "<IP>",
}

# The search begins at the @, which is rare, and looks back for the local part (RFC 5321: at most 64 octets; longer runs
# are taken whole, so that nothing of them is left).
# "@2x." is no domain but the name of an image of double density.
_DOMAIN = re.compile(r"@(?!\dx\.)(?:[^\W_](?:[\w-]{0,62})\.)+(?:xn--[a-zA-Z0-9-]{2,59}|[^\W\d_]{2,24})(?![\w@])")
_LOCAL_BACKWARDS = re.compile(r"[\w+%-](?:[\w.+%-]*[\w+%-])?")
_LOCAL_REACH = 256
# In code "a@b.shape" is an expression: only these and two-letter domains count there.
_CODE_DOMAINS = re.compile(
    "[a-z]{2}|com|org|net|edu|gov|mil|int|info|biz|name|pro|app|dev|cloud|tech|online|site|xyz|email|aero|coop|museum"
    "|systems|software|academy|foundation|example|test|local|localhost|invalid"
)
# Begin at the point and the colon, which are rare beside digits, and tell that most texts have no address.
_IPV4_LIKE = re.compile(r"\.(?<=[0-9]\.)[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
_IPV6_LIKE = re.compile(r":(?<=[23][0-9A-Fa-f]{3}:)[0-9A-Fa-f:]")
_IPV4 = re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\w|\.[0-9])")
# 2000::/3 is all that is allocated of global unicast (IANA), so a public address begins with 2 or 3 and four digits.
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,34}(?:(?<=:)(?:[0-9]{1,3}\.){3}[0-9]{1,3})?(?!\w)")


def redact(text: str, *, code: bool = False, types: Sequence[str] = tuple(PLACEHOLDERS)) -> tuple[str, dict[str, int]]:
    """The text with every match of the types replaced, and the number of matches by type (types with none are absent).

    Applying it again changes nothing and counts nothing: what a replacement uncovers is replaced too.
    """
    counts: dict[str, int] = {}
    again = True
    while again:
        again = False
        for kind, redactor in _REDACTORS.items():
            if kind in types:
                text, count = redactor(text, code)
                if count:
                    counts[kind] = counts.get(kind, 0) + count
                    again = True
    return text, counts


def _emails(text: str, code: bool) -> tuple[str, int]:
    if "@" not in text:
        return text, 0
    pieces: list[str] = []
    done = 0
    for domain in _DOMAIN.finditer(text):
        before = text[max(done, domain.start() - _LOCAL_REACH) : domain.start()]
        local = _LOCAL_BACKWARDS.match(before[::-1])
        if local is None or (code and not _is_address_in_code(text, domain)):
            continue
        pieces += (text[done : domain.start() - local.end()], PLACEHOLDERS["email"])
        done = domain.end()
    return "".join(pieces) + text[done:], len(pieces) // 2


def _is_address_in_code(text: str, domain: re.Match[str]) -> bool:
    top = domain.group().rsplit(".", 1)[1]
    # "q@k.mT" is a product with a transposed matrix.
    top = top.lower() if top.isupper() else top
    return _CODE_DOMAINS.fullmatch(top) is not None and text[domain.end() : domain.end() + 1] not in ("(", "[")


def _addresses(text: str, code: bool) -> tuple[str, int]:
    count = 0

    def replace(public: Callable[[str], str | None]) -> Callable[[re.Match[str]], str]:
        def one(match: re.Match[str]) -> str:
            nonlocal count
            rest = public(match.group())
            if rest is None:
                return match.group()
            count += 1
            return PLACEHOLDERS["ip"] + rest

        return one

    if _IPV6_LIKE.search(text):
        text = _IPV6.sub(replace(lambda m: _after_ipv6(m, code)), text)
    if _IPV4_LIKE.search(text):
        text = _IPV4.sub(replace(_after_ipv4), text)
    return text, count


def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return parsed.is_global and not (parsed.is_reserved or parsed.is_multicast)


def _after_ipv4(match: str) -> str | None:
    """What follows the address in the match (nothing); None when it is no public address."""
    return "" if _is_public(match) else None


def _after_ipv6(match: str, code: bool) -> str | None:
    """As for IPv4; a colon after the address, and what it introduces, is not of it."""
    for address in dict.fromkeys((match, match.removesuffix(":"), match.rpartition(":")[0])):
        groups = [g for g in address.split(":") if g]
        if code and len(groups) < 3 and groups[0].isdigit():
            continue
        if _is_public(address):
            return match[len(address) :]
    return None


# Secrets first: digits and addresses inside of one are not anything else.
_REDACTORS: dict[str, Callable[[str, bool], tuple[str, int]]] = {
    "secret": redact_secrets,
    "email": _emails,
    "iban": redact_ibans,
    "card": redact_cards,
    "phone": redact_phones,
    "ip": _addresses,
}
