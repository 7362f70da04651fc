"""Amounts as a person would say them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Say a time as a person would: 40 seconds, 12 minutes, 3.5 hours, 4 days."""
    for length, word, until in ((1, "second", 90), (60, "minute", 90), (3600, "hour", 48)):
        count = seconds / length
        if count < until:
            digits = 1 if word == "hour" and count < 10 else 0
            text = f"{max(count, 1 if digits == 0 else 0):.{digits}f}"
            return f"{text} {word}" + ("" if float(text) == 1 else "s")
    return f"{seconds / 86400:,.0f} days"


def size(count: float) -> str:
    """Say a number of bytes as a person would: 12.3 MB, 4.5 GB, 1.2 TB."""
    for length, unit in ((1e12, "TB"), (1e9, "GB")):
        if count >= length:
            return f"{count / length:,.1f} {unit}"
    return f"{count / 1e6:,.1f} MB"
