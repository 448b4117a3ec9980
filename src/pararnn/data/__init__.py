"""Token data for language models: preparing it, and opening it with its checksums compared."""

from pararnn.data.config import PrepareConfig as PrepareConfig
from pararnn.data.prepare import prepare as prepare
from pararnn.data.shards import TokenDataset as TokenDataset
from pararnn.data.shards import TokenSplit as TokenSplit
from pararnn.data.shards import open_tokens as open_tokens
