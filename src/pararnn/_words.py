"""Numbers of things in words."""


def counted(number: int, thing: str, things: str = "") -> str:
    """So many things: `1 chunk`, `1,024 chunks`; `things` where its plural is not made by an s."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"
