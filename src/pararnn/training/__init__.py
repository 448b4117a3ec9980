"""Training of language models: data, loop, checkpoints, evaluation."""

from pararnn.data.errors import RunError as RunError
from pararnn.training.config import TrainConfig as TrainConfig
from pararnn.training.evaluation import Evaluation as Evaluation
from pararnn.training.evaluation import evaluate as evaluate
from pararnn.training.run_folder import RunFolder as RunFolder
from pararnn.training.runs import TrainResult as TrainResult
from pararnn.training.runs import load_trained as load_trained
from pararnn.training.runs import train as train
