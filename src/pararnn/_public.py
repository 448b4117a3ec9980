"""What `pararnn` offers; loaded with PyTorch when the first of it is used."""

from pararnn import cells as cells
from pararnn import distributed as distributed
from pararnn import testing as testing
from pararnn.diagnosis import Diagnosis as Diagnosis
from pararnn.diagnosis import diagnose as diagnose
from pararnn.explanation import Explanation as Explanation
from pararnn.explanation import explain as explain
from pararnn.layers.constraints import project_parameters as project_parameters
from pararnn.layers.parallelize import parallelize as parallelize
from pararnn.layers.rnn import RNN as RNN
from pararnn.layers.scan import scan as scan
from pararnn.layers.stacked import ParaGRU as ParaGRU
from pararnn.layers.stacked import ParaLSTM as ParaLSTM
from pararnn.planning.settings import Jacobi as Jacobi
from pararnn.planning.settings import Newton as Newton
from pararnn.planning.settings import Picard as Picard
from pararnn.planning.settings import QuasiNewton as QuasiNewton
from pararnn.planning.settings import Sequential as Sequential
from pararnn.solvers.report import ConvergenceError as ConvergenceError
from pararnn.solvers.report import SolveReport as SolveReport
from pararnn.tracing.recorder import TraceError as TraceError
