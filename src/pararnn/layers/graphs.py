"""Work captured once in a CUDA graph and replayed."""

from pararnn.kernels.graphs import captured as captured
