"""Token data for language models: prepare it, and open it with its checksums compared."""

from pararnn.lm.data.config import PrepareConfig as PrepareConfig
from pararnn.lm.data.prepare import prepare as prepare
from pararnn.lm.data.shards import TokenDataset as TokenDataset
from pararnn.lm.data.shards import TokenSplit as TokenSplit
from pararnn.lm.data.shards import open_tokens as open_tokens
