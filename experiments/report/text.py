"""Numbers and strings as the page shows them."""

import math


def number(value: float, digits: int = 3) -> str:
    """Return `value` with `digits` significant digits, without an exponent where that stays short.

    >>> number(0.000123), number(12345.6), number(2.5), number(0.00001234), number(0)
    ('0.000123', '12,346', '2.5', '1.23e-05', '0')
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - magnitude)
    shown = f"{value:,.{decimals}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def count(value: float) -> str:
    """Return a count with a unit prefix.

    >>> count(134515008), count(460800), count(812)
    ('134.5 M', '460.8 k', '812')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Return a number of bytes in decimal units.

    >>> size(538_060_032), size(1_843_200), size(512)
    ('538 MB', '1.84 MB', '512 bytes')
    """
    for unit_size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit_size:
            return f"{number(value / unit_size)} {unit}"
    return f"{value:.0f} bytes"


def percent(fraction: float, decimals: int = 1) -> str:
    """Return a fraction as a percentage.

    >>> percent(0.9123), percent(1.0), percent(0.00002, 3)
    ('91.2 %', '100 %', '0.002 %')
    """
    shown = f"{100 * fraction:.{decimals}f}"
    return (shown.rstrip("0").rstrip(".") if "." in shown else shown) + " %"


def duration(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds.

    >>> duration(4), duration(252), duration(7325)
    ('4 s', '4 min 12 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def seconds(value: float) -> str:
    """Return a short time with its unit.

    >>> seconds(0.00042), seconds(0.0123), seconds(4.567), seconds(252)
    ('0.42 ms', '12.3 ms', '4.57 s', '4 min 12 s')
    """
    if value < 1:
        return f"{number(1000 * value)} ms"
    return f"{number(value)} s" if value < 60 else duration(value)


def rate(value: object) -> str:
    """Return a learning rate.

    >>> rate(0.0001), rate(0.0003), rate(0.05), rate(None)
    ('1e-4', '3e-4', '0.05', '')
    """
    if not isinstance(value, float | int):
        return "" if value is None else str(value)
    if value >= 0.01 or value <= 0:
        return f"{value:g}"
    mantissa, power = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(power)}"
