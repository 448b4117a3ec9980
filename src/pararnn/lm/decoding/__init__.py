"""Generation with language models: prompts in parallel over time, then one step per token."""

from pararnn.lm.decoding.decoder import Decoder as Decoder
from pararnn.lm.decoding.decoder import generate as generate
from pararnn.lm.decoding.snapshot import Snapshot as Snapshot
from pararnn.planning.decoding_plan import choose_step as choose_step
