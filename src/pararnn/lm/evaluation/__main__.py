"""The command of lm-eval with `--model pararnn`: `python -m pararnn.lm.evaluation ...`."""

from lm_eval.__main__ import cli_evaluate

import pararnn.lm.evaluation as _registers_the_model  # noqa: F401

cli_evaluate()
