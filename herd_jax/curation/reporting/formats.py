"""How the report writes values: numbers for people, and text of unknown origin so that a terminal does not obey it."""


def printable(text: str) -> str:
    """Returns the text for a terminal: without control characters, changes of writing direction and lone surrogates."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def short(number: float) -> str:
    """Writes 12345678 as 12.3M, and 12345 as 12,345."""
    for factor, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if abs(number) >= 0.9995 * factor and abs(number) >= 99_950:
            scaled = number / factor
            return f"{scaled:.0f}{unit}" if abs(scaled) >= 99.95 else f"{scaled:.1f}{unit}"
    return f"{number:,.0f}"


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"
