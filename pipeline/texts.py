"""Real text for models that have a tokenizer."""

from __future__ import annotations

TEXTS = (
    "Proof before deployment.",
    "Le chat noir dort sur le canapé, et la pluie frappe doucement aux vitres.",
    "It costs $3,499.00 (incl. 19% VAT) — e-mail sales@example.com before 2026-12-31!",
    "a",
    "In the second half of the nineteenth century, engineers learnt to measure what they had until "
    "then only claimed, and bridges stopped falling down.",
    "你好，世界 🌍",
    "THE QUICK BROWN FOX jumps over   the lazy dog\nand keeps running.",
    "Donaudampfschifffahrtsgesellschaftskapitän",
)
"""Languages, digits, symbols, one-letter and long."""

_CUT = tuple(dict.fromkeys(
    " ".join(words[start:stop])
    for words in (text.split() for text in TEXTS)
    for start, stop in [
        *((0, end) for end in range(len(words), 0, -1)),
        *((first, len(words)) for first in range(1, len(words))),
    ]
))
CORPUS = (*_CUT, *(f"{one} {other}" for one, other in zip(_CUT, reversed(_CUT), strict=True)))
"""Every beginning and end of those texts, and pairs of them: enough for an interval of a proportion
where a text gives one row."""
