"""Nonlinear RNNs evaluated and trained in parallel over the sequence."""

from pararnn import cells as cells
from pararnn import testing as testing
from pararnn._version import __version__ as __version__
from pararnn.diagnose import Diagnosis as Diagnosis
from pararnn.diagnose import diagnose as diagnose
from pararnn.explain import Explanation as Explanation
from pararnn.explain import explain as explain
from pararnn.layers.constraints import project_parameters as project_parameters
from pararnn.layers.parallelize import parallelize as parallelize
from pararnn.layers.rnn import RNN as RNN
from pararnn.layers.scan import scan as scan
from pararnn.layers.stacked import ParaGRU as ParaGRU
from pararnn.layers.stacked import ParaLSTM as ParaLSTM
from pararnn.solvers.settings import ConvergenceError as ConvergenceError
from pararnn.solvers.settings import Jacobi as Jacobi
from pararnn.solvers.settings import Newton as Newton
from pararnn.solvers.settings import Picard as Picard
from pararnn.solvers.settings import QuasiNewton as QuasiNewton
from pararnn.solvers.settings import Sequential as Sequential
from pararnn.solvers.settings import SolveReport as SolveReport
from pararnn.tracing.recorder import TraceError as TraceError
