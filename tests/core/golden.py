"""Files that hold what the library does; written anew by

    python -m tests.core.golden contracts        or several of the names in WRITERS

after a change that is meant to change them: read the difference before it is committed.
`registers.json` is written by `python -m tests.core.registers --write tests/golden/registers.json`.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "golden"


def read(name):
    return json.loads((FOLDER / name).read_text())


def write_lines(name, content):
    """A mapping as JSON, one line for each entry."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    (FOLDER / name).write_text(f"{{\n{lines}\n}}\n")


def write_contracts():
    from .stored import contracts

    write_lines("contracts.json", contracts())


def write_choices():
    from .choices import recorded

    write_lines("choices.json", recorded())


def write_texts():
    from .generated import texts

    for name, text in texts().items():
        (FOLDER / name).write_text(text)


WRITERS = {"contracts": write_contracts, "choices": write_choices, "texts": write_texts}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for wanted in sys.argv[1:] or WRITERS:
        WRITERS[wanted]()
