"""How reports show themselves: as text in a terminal, as a table in a notebook, each once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


class Report:
    """What a tool returns: `str()` of it is the text, `_repr_html_` what a notebook shows."""

    def _repr_html_(self) -> str:
        raise NotImplementedError

    def _ipython_display_(self) -> None:
        """Show it, unless the same cell of the notebook has shown it already."""
        if (now := _cell_that_runs()) is None:  # IPython in a terminal, where `show` has printed
            print(repr(self))
        elif vars(self).get("_shown_in") != now:
            vars(self)["_shown_in"] = now
            from IPython.display import display

            display({"text/plain": str(self), "text/html": self._repr_html_()}, raw=True)


def show(report: Report) -> None:
    """Show a report: print it, or in a notebook display its table."""
    if _cell_that_runs() is None:
        print(report)
    else:
        report._ipython_display_()


def name_of(file: str) -> str:
    """What a message calls a file of code: In[3] for a cell of a notebook."""
    names: Any = getattr(_shell(), "compile", None)
    cell = names.format_code_name(file) if hasattr(names, "format_code_name") else None
    return cell[1] if cell else file


def _cell_that_runs() -> object:
    """Which cell of a notebook runs now; None elsewhere."""
    shell = _shell()
    return shell.execution_count if hasattr(shell, "kernel") else None


def _shell() -> Any:
    """IPython's, if this process has one."""
    return getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """A table in HTML.

    Args:
        rows: Cells as text; one that is made by `lines` or another function here is left as it is.
        header: Of the columns; none when empty.
    """

    def row(cells: Sequence[object], tag: str) -> str:
        style = "text-align:left;vertical-align:top"
        return (
            "<tr>" + "".join(f'<{tag} style="{style}">{_html(c)}</{tag}>' for c in cells) + "</tr>"
        )

    head = f"<thead>{row(header, 'th')}</thead>" if header else ""
    return Made(f"<table>{head}<tbody>{''.join(row(r, 'td') for r in rows)}</tbody></table>")


class Made(str):
    """HTML that is finished."""


def lines(text: Sequence[str]) -> str:
    """Lines as they are, such as code."""
    return Made(f'<pre style="margin:0">{escape(chr(10).join(text))}</pre>') if text else Made("")


def folded(title: str, text: str) -> str:
    """A text that is shown when its title is clicked."""
    return Made(f"<details><summary>{escape(title)}</summary>{lines(text.splitlines())}</details>")


def _html(cell: object) -> str:
    return cell if isinstance(cell, Made) else escape(str(cell))
