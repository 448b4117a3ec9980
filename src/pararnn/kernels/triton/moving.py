"""A kernel that moves many small tensors on by one entry.

A step of generation changes two or three tensors of a few thousand numbers in every block. A kernel
takes longer to launch than to copy all of them.
"""

import triton
import triton.language as tl


@triton.jit
def move_on(
    held,
    newest,
    texts,
    entries,
    sizes,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Drop the first entry of every tensor and append a new one; a program has a part of one.

    Args:
        held: Each (texts, entries, size).
        newest: Each (texts, size).
        texts: Of each.
        entries: Of each.
        sizes: Of each.
        MOST: A power of two, at least as many as any has entries.
        BLOCK: Numbers of an entry and a program.
    """
    to, new, count, size = held[0], newest[0], entries[0], sizes[0]
    numbers = texts[0] * size
    for n in tl.static_range(1, len(held)):
        mine = tl.program_id(1) == n
        to = tl.where(mine, held[n], to)
        new = tl.where(mine, newest[n], new)
        count = tl.where(mine, entries[n], count)
        size = tl.where(mine, sizes[n], size)
        numbers = tl.where(mine, texts[n] * sizes[n], numbers)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    entry = tl.arange(0, MOST)[:, None]
    inside = (number < numbers) & (entry < count)
    at = to + (number // size * count + entry) * size + number % size
    after = tl.load(at + size, mask=inside & (entry + 1 < count))
    last = tl.load(new + number, mask=number < numbers)
    value = tl.where(entry + 1 < count, after, last)
    tl.debug_barrier()  # all are read before any is written
    tl.store(at, value, mask=inside)
