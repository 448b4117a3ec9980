"""Ready-made cells: plain PyTorch modules, one file each, nothing but `forward(x, state)`."""

from pararnn.cells.gru import ParaGRUCell as ParaGRUCell
from pararnn.cells.lstm import ParaLSTMCell as ParaLSTMCell
