"""What `pararnn.tasks` offers; loaded with PyTorch when the first of it is used."""

from pararnn.tasks.catalogue import TASKS as TASKS
from pararnn.tasks.task import Batch as Batch
from pararnn.tasks.task import Known as Known
from pararnn.tasks.task import Score as Score
from pararnn.tasks.task import Task as Task
from pararnn.tasks.task import draw as draw
from pararnn.tasks.task import score as score
