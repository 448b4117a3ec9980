"""Generation with language models: prompts in parallel over time, then one step per token."""

from pararnn.lm.decoding.choice import StepChoice as StepChoice
from pararnn.lm.decoding.choice import choose_step as choose_step
from pararnn.lm.decoding.decoder import Decoder as Decoder
from pararnn.lm.decoding.decoder import generate as generate
from pararnn.lm.decoding.int8 import int8_weights as int8_weights
from pararnn.lm.decoding.snapshot import Snapshot as Snapshot
