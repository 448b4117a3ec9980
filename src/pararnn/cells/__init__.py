"""Ready-made cells: plain PyTorch modules, one file each, nothing but `forward(x, state)`."""

from pararnn.cells.block_gru import BlockGRUCell as BlockGRUCell
from pararnn.cells.cfc import ClosedFormContinuousCell as ClosedFormContinuousCell
from pararnn.cells.delta_memory import DeltaMemoryCell as DeltaMemoryCell
from pararnn.cells.diagonal import DiagonalCell as DiagonalCell
from pararnn.cells.elman import DiagonalElmanCell as DiagonalElmanCell
from pararnn.cells.full_lstm import DiagonalLSTMCell as DiagonalLSTMCell
from pararnn.cells.gated_delta import GatedDeltaCell as GatedDeltaCell
from pararnn.cells.gru import ParaGRUCell as ParaGRUCell
from pararnn.cells.janet import ForgetGateCell as ForgetGateCell
from pararnn.cells.layer_norm_lstm import LayerNormLSTMCell as LayerNormLSTMCell
from pararnn.cells.lstm import ParaLSTMCell as ParaLSTMCell
from pararnn.cells.m2rnn import M2RNNCell as M2RNNCell
from pararnn.cells.mamba2 import Mamba2Cell as Mamba2Cell
from pararnn.cells.matrix_memory import MatrixMemoryCell as MatrixMemoryCell
from pararnn.cells.mgu import MinimalGatedCell as MinimalGatedCell
from pararnn.cells.min_gru import MinGRUCell as MinGRUCell
from pararnn.cells.outer_memory import OuterMemoryCell as OuterMemoryCell
from pararnn.cells.slstm import SLSTMCell as SLSTMCell
from pararnn.cells.slstm_heads import HeadSLSTMCell as HeadSLSTMCell
