"""Next-token cross-entropy and z-loss."""

from torch import Tensor

IGNORED = -100


def language_model_loss(
    logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and mean squared log-partition over the targets that are not ignored.

    Args:
        logits: Shape (..., vocab_size), float32.
        targets: Shape (...), int64; -100 is ignored.
        num_items: Divide the sums by this number, for example of all targets of a step.

    Returns:
        Cross-entropy in nats per token, and the z-loss (PaLM, arXiv 2204.02311, section 5) before
        its weight: both scalars, 0 when no target counts.

    Raises:
        ValueError: The shapes of targets and logits do not match.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have shape {tuple(targets.shape)} but there are logits for "
            f"{tuple(logits.shape[:-1])}; pass one label per token."
        )
    counted = targets != IGNORED
    log_partition = logits.logsumexp(-1)
    chosen = logits.gather(-1, targets.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    count = counted.sum().clamp_min(1) if num_items is None else num_items
    if isinstance(count, Tensor):
        count = count.to(logits.device)
    cross_entropy = ((log_partition - chosen) * counted).sum() / count
    z_loss = (log_partition.square() * counted).sum() / count
    return cross_entropy, z_loss
