"""Generation with language models: prompts in parallel over time, then one step per token."""

from pararnn.lm.decoding.decoder import Decoder as Decoder
from pararnn.lm.decoding.decoder import generate as generate
