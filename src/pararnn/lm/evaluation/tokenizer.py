"""Bytes as tokens, for the models that `pararnn train` makes of plain text."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizer

from pararnn.lm.data.reading import DOCUMENT


class ByteTokenizer(PreTrainedTokenizer):
    """UTF-8 bytes; a text begins with the byte that precedes every document in training."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 # transformers' own

    def __init__(self, **options: Any) -> None:
        mark = chr(DOCUMENT)
        super().__init__(bos_token=mark, eos_token=mark, pad_token=mark, **options)

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return 256

    def get_vocab(self) -> dict[str, int]:  # noqa: D102
        return {chr(byte): byte for byte in range(256)}

    def build_inputs_with_special_tokens(  # noqa: D102
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [DOCUMENT, *token_ids_0, *(token_ids_1 or [])]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of bytes; U+FFFD where they are no UTF-8."""
        return bytes(map(ord, tokens)).decode(errors="replace")

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)
