"""Nonlinear RNNs evaluated and trained in parallel over the sequence."""

from pararnn import cells as cells
from pararnn._version import __version__ as __version__
from pararnn.layers.constraints import project_parameters as project_parameters
from pararnn.layers.rnn import RNN as RNN
from pararnn.solvers.settings import Newton as Newton
