"""`python -m pararnn.cli`."""

import sys

from pararnn.cli.main import main

sys.exit(main())
