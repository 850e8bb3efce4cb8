"""Numbers as people read them."""


def in_bytes(size: int) -> str:
    """Return a size in a unit that fits.

    Example:
        >>> in_bytes(80), in_bytes(2_500_000), in_bytes(64 * 10**9)
        ('80 B', '2.5 MB', '64.0 GB')
    """
    amount, units = float(size), ["B", "kB", "MB", "GB", "TB", "PB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.0f} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def counted(number: int) -> str:
    """Return a number of weights.

    Example:
        >>> counted(700), counted(124_439_808), counted(8_190_735_360)
        ('700', '124.4 M', '8.19 B')
    """
    for unit, size, digits in (("B", 10**9, 2), ("M", 10**6, 1), ("k", 10**3, 1)):
        if number >= size:
            return f"{number / size:.{digits}f} {unit}"
    return str(number)
