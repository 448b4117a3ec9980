"""The names of backends; without PyTorch, for command lines that only check them."""

BACKENDS = ("c", "triton")
NAMES = ("auto", "torch", *BACKENDS)


class BackendError(ValueError):
    """The named backend does not exist or cannot run the cell."""


def check_name(name: str) -> None:
    """Refuse a backend that does not exist."""
    if name not in NAMES:
        raise BackendError(f"backend={name!r} is not known; choose one of {', '.join(NAMES)}.")
