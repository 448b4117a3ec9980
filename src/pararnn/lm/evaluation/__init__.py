"""Tasks of EleutherAI's lm-eval harness; needs the extra `pararnn[eval]`."""

try:
    from lm_eval.models.huggingface import HFLM as _HFLM  # noqa: F401 # whether it is there
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("lm_eval", "accelerate"):
        raise
    raise ModuleNotFoundError(
        f"tasks need the package {package}, which is not installed; install the extra: "
        'pip install "pararnn[eval]"',
        name=error.name,
    ) from error

from pararnn.lm.evaluation.harness import HarnessModel as HarnessModel
from pararnn.lm.evaluation.tasks import run_tasks as run_tasks
from pararnn.lm.evaluation.tokenizer import ByteTokenizer as ByteTokenizer
