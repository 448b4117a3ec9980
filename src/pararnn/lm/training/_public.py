"""What `pararnn.lm.training` offers; loaded with transformers when the first of it is used."""

from pararnn.lm.data.errors import RunError as RunError
from pararnn.lm.training.config import TrainConfig as TrainConfig
from pararnn.lm.training.evaluation import Evaluation as Evaluation
from pararnn.lm.training.evaluation import evaluate as evaluate
from pararnn.lm.training.run_folder import RunFolder as RunFolder
from pararnn.lm.training.runs import TrainResult as TrainResult
from pararnn.lm.training.runs import train as train
from pararnn.lm.training.trained import load_trained as load_trained
