"""Month and hour out of free-form dates."""

from __future__ import annotations

import re
from datetime import date, datetime
from typing import Any

# Two defaults that differ in everything: what both readings share stood in the text. Days up to 28,
# so that no month cuts them.
_DEFAULTS = (datetime(2000, 3, 5, 7, 11, 13), datetime(2004, 8, 17, 19, 29, 31))
_LONGEST = 100
"""Characters of a text that is still tried as a date."""
# Cameras write 2012:05:03 13:22:11.
_CAMERA = re.compile(r"^\s*(\d{4}):(\d\d):(\d\d)(?!\d)")


def month_and_hour(value: Any) -> tuple[int | None, int | None]:
    """Read month and local hour of a date, as far as it tells them.

    Texts are read by ``dateutil``, as the published code does (``03/04/2012`` is the 4th of March).
    Not as there, a date without a clock has no hour, and one without a month has no month: there
    the hour is 0, the month is today's, and both count as known (SPEC section 4). Zones are not
    applied: the hour is the one that is written.

    Parameters
    ----------
    value
        A text, a date, or a date with a clock. Midnight sharp in the latter is taken for a date
        alone: this is what a column of dates becomes.

    Returns
    -------
    month, hour
        1 to 12 and 0 to 23; None: not told, or no date at all.
    """
    if isinstance(value, datetime):
        midnight = (value.hour, value.minute, value.second, value.microsecond) == (0, 0, 0, 0)
        return value.month, None if midnight else value.hour
    if isinstance(value, date):
        return value.month, None
    if not isinstance(value, str) or not value.strip() or len(value) > _LONGEST:
        return None, None
    text = _CAMERA.sub(r"\1-\2-\3", value)
    # A number alone is a year or nothing: as a day or an hour it would be a guess.
    if text.strip().isdecimal() and len(text.strip()) not in (6, 8, 12, 14):
        return None, None
    from dateutil import parser

    try:
        first, second = (parser.parse(text, default=d, ignoretz=True) for d in _DEFAULTS)
    except (ValueError, OverflowError, TypeError, AttributeError, IndexError, ArithmeticError):
        return None, None
    month = first.month if first.month == second.month else None
    hour = first.hour if first.hour == second.hour else None
    return month, hour
