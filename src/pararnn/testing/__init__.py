"""Checks for cells: everything compared with the step-by-step loop."""

from pararnn.testing.check import CellCheck as CellCheck
from pararnn.testing.check import check_cell as check_cell
from pararnn.testing.close import assert_close as assert_close
from pararnn.testing.loop import loop as loop
