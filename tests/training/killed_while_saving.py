"""`pararnn.cli` of which process 2 is killed inside the second checkpoint, before its part of it.

Then the threads of processes 1 and 3 wait for the one of process 0, which has failed, and among the
four the main thread of process 0 is connected to 1 and 3 only.
"""

import os
import signal
import sys
from itertools import count

from torch.distributed import distributed_c10d

from pararnn.cli.main import main

gather, calls = distributed_c10d.gather, count(1)
GATHERS_OF_A_CHECKPOINT = 2


def gather_or_die(*args, **options):
    if next(calls) > GATHERS_OF_A_CHECKPOINT:
        os.kill(os.getpid(), signal.SIGKILL)
    return gather(*args, **options)


if os.environ["RANK"] == "2":
    distributed_c10d.gather = gather_or_die

sys.exit(main())
