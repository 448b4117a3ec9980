"""`pararnn.cli` whose first process takes long to close its log, so that others end before it."""

import os
import sys
import time

from torch.utils.tensorboard import SummaryWriter

from pararnn.cli.main import main

close = SummaryWriter.close


def close_slowly(board):
    time.sleep(2)
    close(board)


if os.environ["RANK"] == "0":
    SummaryWriter.close = close_slowly

sys.exit(main())
