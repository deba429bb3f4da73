"""A colour scale for heat maps: lightness rises evenly, so it survives colour blindness and grey print."""

# viridis (CC0, the colour map of matplotlib) at equal distances
_STOPS = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")
SCALE = tuple(f"#{stop}" for stop in _STOPS)


def fill(share: float) -> str:
    """Return the colour of a value, `share` of the way along the scale, as `#rrggbb`.

    >>> fill(0), fill(1), fill(0.5)
    ('#440154', '#fde725', '#22908c')
    """
    at = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    first = min(int(at), len(_STOPS) - 2)
    low, high = (_channels(stop) for stop in _STOPS[first : first + 2])
    return "#" + "".join(f"{round(a + (at - first) * (b - a)):02x}" for a, b in zip(low, high, strict=True))


def ink(share: float) -> str:
    """Return black or white, whichever has the higher contrast with the fill (WCAG 2's relative luminance).

    >>> ink(0), ink(1)
    ('#fff', '#000')
    """
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (v / 255 for v in _channels(fill(share)[1:]))
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (0, 2, 4))
