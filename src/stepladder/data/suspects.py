"""What a text may hold that should not be trained: secrets and personal data, and characters gone wrong.

Patterns find look-alikes too, so what is found is a warning. All of them are bounded: a long text
of any content takes time in proportion to its length.
"""

from __future__ import annotations

import re

E_MAIL, SECRET, PRIVATE_KEY = "an e-mail address", "a key or password", "a private key"
CARD, PHONE = "a card number", "a phone number"

PRIVATE = {
    # Names under the reserved domains (example.com, .test) are nobody's.
    E_MAIL: re.compile(r"\b[\w.+-]{1,64}@(?!example\.)(?:[\w-]+\.)+(?!example\b|test\b|invalid\b)[a-zA-Z]{2,}\b"),
    SECRET: re.compile(
        r"\b(?:sk-[\w-]{20,}|sk_(?:live|test)_\w{16,}|gh[pousr]_\w{36}|github_pat_\w{22,}|glpat-[\w-]{20}"
        r"|hf_[A-Za-z]{30,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abeprs]-[\w-]{10,}"
        r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
        # a name and a value of letters and digits: `client_secret = 'f3k29dk20…'`
        r"|(?i:(?<![a-z])(?:api[_-]?key|secret|access[_-]?token|password)[\w-]{0,20}[\"']?\s{0,3}[:=]\s{0,3}[\"']?"
        r"(?=\S{0,40}\d)(?=\S{0,40}[a-z])[\w/+.=-]{12,100})"
    ),
    PRIVATE_KEY: re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"),
    CARD: re.compile(r"(?<![\d.])[3-6]\d{3}(?:[ -]?\d){9,15}(?!\d)"),
    PHONE: re.compile(
        r"(?<![\w+])\+\d{1,3}(?:[ ./-]?\(?\d{1,4}\)?){2,5}(?!\d)"
        r"|(?<![\d.-])(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[.-]\d{4}(?![\d-])"
    ),
}
ODD = {
    "replacement characters (�), left by an earlier wrong decoding,": re.compile("\ufffd"),
    "control characters": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    "invisible characters": re.compile(r"[\u200b\u2060\u202a-\u202e\u2066-\u2069\ufeff]"),
    "UTF-8 that was read as Latin-1 (Ã©, â€™)": re.compile(r"[ÂÃ][\x80-\xbf\u0152-\u0178\u2018-\u2122]|â€|ðŸ"),
}


def private(text: str) -> list[str]:
    """The kinds of secrets and personal data that a text seems to hold."""
    return [kind for kind, form in PRIVATE.items() if any(_is_meant(kind, m[0]) for m in form.finditer(text))]


def odd(text: str) -> list[str]:
    """The kinds of characters in a text that no writer meant."""
    return [kind for kind, form in ODD.items() if form.search(text)]


def _is_meant(kind: str, text: str) -> bool:
    """Whether digits can be what they look like: cards have a check digit (Luhn), phone numbers 8 to 15 digits."""
    digits = [int(c) for c in text if c.isdecimal()]
    if kind == CARD:
        doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
        return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0
    return kind != PHONE or 8 <= len(digits) <= 15
