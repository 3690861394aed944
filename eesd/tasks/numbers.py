"""The final number of a worked solution, as exact-match scoring of GSM8K and ASDiv needs it.

final_number("... so she makes $1,080.00 a day.")  # Decimal("1080.00")
"""

from __future__ import annotations

import re
from decimal import Decimal

# A minus directly after a digit is subtraction, not a sign.
NUMBER = re.compile(r"(?<![\d.,])-?\d[\d,]*(?:\.\d+)?|(?<!\d)-?\.\d+")
MARKER = re.compile(r"####|answer(?: is|:)", re.IGNORECASE)


def numbers(text: str) -> list[Decimal]:
    """All numbers of a text in order, thousands separators removed."""
    return [Decimal(found.replace(",", "")) for found in NUMBER.findall(text)]


def final_number(text: str) -> Decimal | None:
    """The first number after the last "####" or "answer is"; without such a marker the last number, if any."""
    markers = list(MARKER.finditer(text))
    after = numbers(text[markers[-1].end() :]) if markers else []
    if after:
        return after[0]
    found = numbers(text)
    return found[-1] if found else None


def exact_match(text: str, reference: str) -> dict[str, float]:
    """1.0 if the final number of `text` equals the reference number in value, else 0.0."""
    return {"exact_match": float(final_number(text) == Decimal(reference))}
