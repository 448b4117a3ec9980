"""Reports in a notebook: each is shown once, as a table, whatever is done with what comes back."""

import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pararnn
from pararnn._notebook import Report, table


class Leaky(nn.Module):
    input_size, hidden_size = 4, 6

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 6)
        self.decay = nn.Parameter(torch.rand(6))

    def forward(self, x, h):
        return torch.tanh(self.decay * h + self.project(x))


class Text(HTMLParser):
    """The text of a page; fails where a tag is not closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.found = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.found.append(data)


def text_of(report):
    return " ".join(Text(report._repr_html_()).found)


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook has displayed; its number of the running cell is `shell.execution_count`."""
    shell = SimpleNamespace(kernel=object(), execution_count=1)
    displayed = []
    pretended = SimpleNamespace(get_ipython=lambda: shell, version_info=(9, 0))
    display = SimpleNamespace(display=lambda shown, raw: displayed.append(shown))
    monkeypatch.setitem(sys.modules, "IPython", pretended)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return SimpleNamespace(shell=shell, displayed=displayed)


TOOLS = {
    "explain": pararnn.explain,
    "diagnose": lambda rnn: pararnn.diagnose(rnn, torch.randn(2, 20, 4)),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_shown_once(tool, notebook, capsys):
    report = TOOLS[tool](pararnn.RNN(Leaky()))
    assert len(notebook.displayed) == 1
    report._ipython_display_()  # as the last line of the cell
    assert len(notebook.displayed) == 1
    notebook.shell.execution_count = 2
    report._ipython_display_()
    shown = {"text/plain": str(report), "text/html": report._repr_html_()}
    assert notebook.displayed == [shown] * 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tool", TOOLS)
def test_a_terminal_prints(tool, capsys):
    report = TOOLS[tool](pararnn.RNN(Leaky()))
    assert str(report) in capsys.readouterr().out
    assert "\n" not in repr(report)  # what an interpreter adds to it
    report._ipython_display_()
    assert capsys.readouterr().out == f"{report!r}\n"


def test_what_tables_say(capsys):
    rnn = pararnn.RNN(Leaky())
    found = pararnn.explain(rnn)
    text = text_of(found)
    for line in (*found.equations, *found.state, *found.recurrent_part, found.structure_reason):
        assert line in text
    assert all(str(choice.because) in text for choice in found.plan.choices)
    assert found.source.strip() in text
    assert text_of(rnn.plan((8, 1024, 4))).count("threads") >= 1
    rnn(torch.randn(2, 100, 4))
    assert rnn.report.status in text_of(rnn.report)
    check = pararnn.testing.check_cell(Leaky())
    assert all(run in text_of(check) for run in check.errors)
    diagnosis = pararnn.diagnose(rnn, torch.randn(2, 20, 4))
    assert diagnosis.recommendation in text_of(diagnosis)
    assert re.search(r'<img [^>]*src="data:image/png;base64,iVBOR', diagnosis._repr_html_())


def test_messages_name_the_cell_of_the_notebook(notebook):
    names = {__file__: ("Cell", "In[7]")}
    notebook.shell.compile = SimpleNamespace(format_code_name=names.get)

    class Writes(Leaky):
        def forward(self, x, h):
            h += x.sum()
            return h

    with pytest.raises(pararnn.TraceError, match=r"in place at In\[7\]:\d+;"):
        pararnn.RNN(Writes())


def test_files_of_pytorch_are_called_as_within_it(capsys):
    found = pararnn.explain(pararnn.RNN(nn.GRUCell(4, 6)))
    assert re.search(r"^addmm at torch/nn/modules/rnn\.py:\d+", found.structure_reason)


def test_no_plot_without_matplotlib(monkeypatch, capsys):
    found = pararnn.diagnose(pararnn.RNN(Leaky()), torch.randn(2, 20, 4))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "<img" not in found._repr_html_()


def test_what_is_written_is_not_read_as_html():
    assert "a &lt; b" in table([("a < b",)], header=("<i>",))
    assert "<i>" not in table([("a < b",)], header=("<i>",))


def test_reports_must_have_a_table():
    with pytest.raises(NotImplementedError):
        Report()._repr_html_()
