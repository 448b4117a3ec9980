"""The processes among which the time of one sequence is split, and what they tell each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankError(RuntimeError):
    """Another rank of the sequence failed or did not come, or the ranks do not do the same."""


class Ranks:
    """The ranks of a process group in the order of the time that they hold.

    Every method is called by all of them. Before tensors are exchanged, the ranks exchange what
    they are about to do, in a message of fixed size: where they differ, or where one of them
    failed, all raise an error.

    Args:
        group: The processes; every one holds the next part of time.
        backwards: Time begins on the last rank, as for a layer that runs backwards.

    Attributes:
        count: Ranks.
        position: Of this rank, in the order of time.
    """

    def __init__(self, group: dist.ProcessGroup, backwards: bool = False) -> None:
        self.group, self.backwards = group, backwards
        self.count, rank = dist.get_world_size(group), dist.get_rank(group)
        self.position = self.count - 1 - rank if backwards else rank
        self._calls = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """A copy of a layer is on the same ranks."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a layer whose time is split over ranks cannot be pickled: its process group belongs "
            "to this process. Call sequence_parallel(layer, None) before."
        )

    def reversed(self) -> Ranks:
        """The same ranks, with time in the other direction."""
        return Ranks(self.group, not self.backwards)

    def next_call(self) -> int:
        """The number of a call that all ranks make."""
        self._calls += 1
        return self._calls

    def agree(
        self,
        what: Mapping[str, object],
        numbers: Sequence[int],
        device: torch.device,
        failure: Exception | None = None,
    ) -> list[list[int]]:
        """Exchange numbers, once all ranks are about to do the same.

        Args:
            what: What this rank is about to do, by name; must be the same on all.
            numbers: As many on every rank; they may differ.
            device: Where the group exchanges tensors.
            failure: Why this rank cannot.

        Returns:
            The numbers of every rank, in the order of time.

        Raises:
            RankError: Ranks differ, or another one failed.
            Exception: `failure`.
        """
        text = repr(dict(what)).encode()
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
        own = torch.tensor([digest, *numbers], dtype=torch.int64, device=device)
        found = self.gather(own, failure).tolist()  # a host sync
        if any(row[0] != digest for row in found):
            self._tell_apart(what)
        return [row[1:] for row in found]

    def gather(self, tensor: Tensor, failure: Exception | None = None) -> Tensor:
        """The tensors of all ranks, (count, *shape), in the order of time.

        Args:
            tensor: Of the same shape and type on all, with any values where there is a failure.
            failure: Why this rank has no such tensor.

        Raises:
            RankError: Another rank failed.
            Exception: `failure`.
        """
        own = tensor.detach().contiguous().view(-1).view(torch.uint8)
        sent = torch.cat([own, own.new_full((1,), failure is not None)])
        found = [torch.empty_like(sent) for _ in range(self.count)]
        with self._waiting():
            dist.all_gather(found, sent, self.group)
        if bool(torch.stack(found)[:, -1].any()):  # a host sync
            self._raise(failure)
        every = torch.stack([one[:-1] for one in found])
        tensors = every.view(tensor.dtype).view(self.count, *tensor.shape)
        return tensors.flip(0) if self.backwards else tensors

    def exchange(self, tensor: Tensor) -> Tensor:
        """As `gather`, of tensors whose shapes may differ by mistake."""
        what = {"the shape of what is exchanged": (tuple(tensor.shape), tensor.dtype)}
        self.agree(what, [], tensor.device)
        return self.gather(tensor)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Say what it means if an exchange fails: one rank at least did not take part."""
        try:
            yield
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RankError(
                f"the other ranks of the sequence did not all come to an exchange: {reason} One "
                "has died, has not called the same layers, or has not gone back through the "
                "outputs of its part; a rank without a loss calls (0 * y.sum()).backward(). How "
                "long ranks wait is the timeout of their group: init_process_group(timeout=...)."
            ) from error

    def _raise(self, failure: Exception | None) -> None:
        """Raise the failure of this rank, or say which other one failed and why."""
        reasons: list[str | None] = [None] * self.count
        reason = None if failure is None else f"{type(failure).__name__}: {failure}"
        with self._waiting():
            dist.all_gather_object(reasons, reason, self.group)
        if failure is not None:
            raise failure
        rank = next(i for i, r in enumerate(reasons) if r is not None)
        raise RankError(f"rank {rank} of the sequence failed: {reasons[rank]}")

    def _tell_apart(self, what: Mapping[str, object]) -> None:
        """Raise an error that names what differs."""
        every: list[dict[str, object]] = [{}] * self.count
        with self._waiting():
            dist.all_gather_object(every, {k: str(v) for k, v in what.items()}, self.group)
        names = dict.fromkeys(name for one in every for name in one)
        name = next((n for n in names if len({one.get(n) for one in every}) > 1), "the call")
        seen = ", ".join(f"{one.get(name)} on rank {i}" for i, one in enumerate(every))
        raise RankError(
            f"the ranks of a sequence must do the same, but {name} is {seen}. All ranks call the "
            "same layers in the same order, with inputs that differ in time alone."
        )
