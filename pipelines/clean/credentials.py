"""Secrets in text: the formats of tokens that say what they are, and private keys.

The formats of AWS, GitHub, npm, SendGrid, Slack, Square and Stripe are detect-secrets' rules (the package
bc-detect-secrets, which is kept where Yelp's has had no release since 2024); the rest are what their issuers document
and that library lacks. Only formats with a fixed beginning are here, so a text without one costs a search for a few
strings. Every pattern begins at a boundary of words, which keeps a long run of its own beginning from being read again
from each place in it. A JSON Web Token counts when its header and claims are JSON (RFC 7519, section 7.2), a private
key (RFC 7468; PGP's and OpenSSH's alike) when what lies between its two lines is mostly base64.
Left out: rules by entropy or by the name of a variable, tokens without a beginning of their own (Discord, Twilio), and
asking the issuer whether a secret is alive.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from detect_secrets.plugins.aws import AWSKeyDetector
from detect_secrets.plugins.base import RegexBasedDetector
from detect_secrets.plugins.github_token import GitHubTokenDetector
from detect_secrets.plugins.jwt import JwtTokenDetector
from detect_secrets.plugins.npm import NpmDetector
from detect_secrets.plugins.sendgrid import SendGridDetector
from detect_secrets.plugins.slack import SlackDetector
from detect_secrets.plugins.square_oauth import SquareOAuthDetector
from detect_secrets.plugins.stripe import StripeDetector

SECRET = "<SECRET>"
_KEY_BEGIN = re.compile(r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_KEY_END = "-----END "
_KEY_REACH = 16384  # characters; RSA of 16,384 bits has 12,700
_KEY_RUN = re.compile(r"(\\[nrt])|[A-Za-z0-9+/=]{16,}")
_KEY_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of token. anchors: every one holds one of these; group: what of a match is the secret, 0 all of it."""

    anchors: tuple[str, ...]
    pattern: re.Pattern[str]
    group: int = 0


def _published(anchor: str, rest: str) -> Format:
    return Format(anchors=(anchor,), pattern=re.compile(rf"(?<![A-Za-z0-9_-]){re.escape(anchor)}{rest}"))


def _library(detector: type[RegexBasedDetector], index: int, *anchors: str) -> Format:
    rule = list(detector.denylist)[index]  # type: ignore[call-overload]  # a property in the base, a list in each rule
    return Format(anchors=anchors, pattern=re.compile(rf"(?<![A-Za-z0-9_-])(?:{rule.pattern})", rule.flags))


FORMATS = (
    _library(AWSKeyDetector, 0, "AKIA", "ASIA", "ABIA", "ACCA", "A3T"),
    _library(GitHubTokenDetector, 0, "ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    _library(NpmDetector, 0, "npm_"),
    _library(SendGridDetector, 0, "SG."),
    _library(SlackDetector, 0, "xox"),
    _library(SlackDetector, 1, "https://hooks.slack.com/services/"),
    _library(SquareOAuthDetector, 0, "sq0csp-"),
    _library(StripeDetector, 0, "k_live_"),
    # The secret access key beside its name: 40 characters in quotes.
    Format(
        anchors=("aws", "AWS"),
        pattern=re.compile(
            r"aws.{0,20}?(?:key|pwd|pw|password|pass|token).{0,20}?['\"]([0-9a-zA-Z/+]{40})['\"]", re.IGNORECASE
        ),
        group=1,
    ),
    _published("github_pat_", r"[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"),
    _published("glpat-", r"[A-Za-z0-9_-]{20,64}"),
    _published("pypi-AgEIcHlwaS5vcmc", r"[A-Za-z0-9_-]{70,}"),
    _published("sk-ant-", r"[A-Za-z0-9_-]{80,}"),
    Format(
        anchors=("T3BlbkFJ",),
        pattern=re.compile(r"(?<![A-Za-z0-9_-])sk-[A-Za-z0-9_-]{20,100}?T3BlbkFJ[A-Za-z0-9_-]{20,100}"),
    ),
    _published("AIza", r"[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
    _published("hf_", r"[A-Za-z0-9]{34}(?![A-Za-z0-9_-])"),
    Format(anchors=("AccountKey=",), pattern=re.compile(r"AccountKey=([A-Za-z0-9+/]{86}==)"), group=1),
)
_JSON_WEB_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?(?![A-Za-z0-9_-])"
)


def redact_secrets(text: str, code: bool) -> tuple[str, int]:
    """The text with every secret replaced, and their number; code makes no difference."""
    count = 0
    if "PRIVATE KEY" in text:
        text, count = _private_keys(text)
    for format_ in FORMATS:
        if any(anchor in text for anchor in format_.anchors):
            text, found = _replace(text, format_)
            count += found
    if "eyJ" in text:
        text, found = _json_web_tokens(text)
        count += found
    return text, count


def _replace(text: str, format_: Format) -> tuple[str, int]:
    def one(match: re.Match[str]) -> str:
        start, end = match.start(format_.group) - match.start(), match.end(format_.group) - match.start()
        return match.group()[:start] + SECRET + match.group()[end:]

    return format_.pattern.subn(one, text)


def _json_web_tokens(text: str) -> tuple[str, int]:
    count = 0

    def one(match: re.Match[str]) -> str:
        nonlocal count
        if not JwtTokenDetector.is_formally_valid(match.group()):
            return match.group()
        count += 1
        return SECRET

    return _JSON_WEB_TOKEN.sub(one, text), count


def _private_keys(text: str) -> tuple[str, int]:
    """The keys' base64 is taken out, the first run of it replaced; what is around it, line ends and quotes, stays."""
    pieces: list[str] = []
    done = count = 0
    for begin in _KEY_BEGIN.finditer(text):
        end = text.find(_KEY_END, begin.end(), begin.end() + _KEY_REACH)
        if end < 0 or begin.end() < done:
            continue
        body = text[begin.end() : end]
        runs = [m for m in _KEY_RUN.finditer(body) if m[1] is None]
        letters = sum(map(str.isalnum, body)) - sum(m[1] is not None for m in _KEY_RUN.finditer(body))
        if not runs or sum(len(m.group()) for m in runs) < _KEY_SHARE * letters:
            continue
        kept = _KEY_RUN.sub(lambda m: m[1] or "", body[runs[0].end() :])
        pieces += (text[done : begin.end()], body[: runs[0].start()], SECRET, kept)
        done = end
        count += 1
    return "".join(pieces) + text[done:], count
