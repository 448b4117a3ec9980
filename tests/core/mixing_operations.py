"""Operations that mix channels, each as a function of two values (N, 3, 4); the first has a state.

The result may have any shape (N, ...), and any type.
"""

import torch
import torch.nn.functional as F
from torch import linalg


def _written(m, w):
    t = m.clone()
    t[:, 0] = w[:, 1]
    t[:, 1:, 2] += m[:, :2, 0]
    t[:, :, 3].mul_(w[:, :, 0])
    return t


def _without_grad(m, w):
    t = m * 1.5
    with torch.no_grad():
        t.clamp_(-0.4, 0.5)
    return t * m


def _written_as_data(m):
    t = m * 1.5
    t.data.clamp_(-0.4, 0.5)
    return t * m


def _symmetric(m):
    return torch.eye(3, dtype=m.dtype) * 2 + 0.2 * (m[..., :3] + m[..., :3].mT)


def _apart(m):
    """Entries of a row in an order that is sure."""
    return m + torch.arange(4)


def _complex(m):
    return torch.view_as_complex(m.unflatten(2, (2, 2)))


def _real(z):
    return torch.view_as_real(z.resolve_conj())


def _order(m):
    return m.detach().argsort(-1)


def _weight(*shape):
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape).sin()


OPERATIONS = {
    # sums and such
    "sum": lambda m, w: m.sum(1),
    "mean": lambda m, w: m.mean((1, 2), keepdim=True) * m,
    "prod": lambda m, w: m.prod(2),
    "amax": lambda m, w: m.amax(1),
    "amin": lambda m, w: m.amin((1, 2)),
    "max": lambda m, w: m.max(1).values,
    "min_and_where": lambda m, w: m.min(2)[0] * m.min(2)[1],
    "aminmax": lambda m, w: torch.stack(torch.aminmax(m, dim=1), 1),
    "std": lambda m, w: m.std(2),
    "var": lambda m, w: m.var(1, correction=0),
    "var_mean": lambda m, w: torch.cat(torch.var_mean(m, 2), 1),
    "std_mean": lambda m, w: torch.cat(torch.std_mean(m, 1), 1),
    "norm": lambda m, w: m.norm(dim=2),
    "norm_1": lambda m, w: m.norm(1, dim=1),
    "norm_inf": lambda m, w: linalg.vector_norm(m, torch.inf, dim=2),
    "norm_3": lambda m, w: linalg.vector_norm(m, 3, dim=2),
    "logsumexp": lambda m, w: m.logsumexp((1, 2)),
    "median": lambda m, w: m.median(1).values,
    "mode": lambda m, w: m.mode(1).values,
    "nansum": lambda m, w: m.nansum(2),
    "nanmean": lambda m, w: m.nanmean(1),
    "quantile": lambda m, w: torch.quantile(m, 0.3, dim=1),
    "count_nonzero": lambda m, w: torch.count_nonzero(m > 0, 1) * m[:, 0],
    "any": lambda m, w: (m > 0.1).any(1) * m[:, 0],
    "all": lambda m, w: (m > -0.3).all(2, keepdim=True) * m,
    "cumsum": lambda m, w: m.cumsum(1),
    "cumprod": lambda m, w: m.cumprod(2),
    "cummax": lambda m, w: m.cummax(2).values,
    "cummin": lambda m, w: m.cummin(1).values,
    "logcumsumexp": lambda m, w: m.logcumsumexp(2),
    "diff": lambda m, w: m.diff(dim=2),
    "trapezoid": lambda m, w: torch.trapezoid(m, dim=2),
    "cumulative_trapezoid": lambda m, w: torch.cumulative_trapezoid(m, dim=1),
    "gradient": lambda m, w: torch.gradient(m, dim=2)[0],
    "renorm": lambda m, w: F.normalize(m, dim=2) * 0.5,
    # order
    "sort": lambda m, w: m.sort(2).values,
    "sort_down": lambda m, w: m.sort(dim=1, descending=True, stable=True)[0],
    "msort": lambda m, w: m.transpose(0, 1).msort().transpose(0, 1),
    "argsort": lambda m, w: w.gather(2, _order(m)) * m,
    "topk": lambda m, w: m.topk(2, dim=2).values,
    "kthvalue": lambda m, w: m.kthvalue(2, dim=2).values,
    "argmax": lambda m, w: F.one_hot(m.argmax(2), 4) * m,
    "searchsorted": lambda m, w: torch.searchsorted(_apart(w.detach() * 0.1), m.detach()) * m,
    "bucketize": lambda m, w: torch.bucketize(m, torch.tensor([-0.5, 0.0, 0.5])) * m,
    # softmax and norms
    "softmax": lambda m, w: m.softmax(2),
    "log_softmax": lambda m, w: m.log_softmax(1),
    "softmin": lambda m, w: F.softmin(m, 2),
    "softmax_single": lambda m, w: m.softmax(1, dtype=torch.float64),
    "glu": lambda m, w: F.glu(m, 2),
    "layer_norm": lambda m, w: F.layer_norm(m, (3, 4)),
    "layer_norm_weight": lambda m, w: F.layer_norm(m, (4,), _weight(4), _weight(4)),
    "rms_norm": lambda m, w: F.rms_norm(m, (4,), _weight(4)),
    "group_norm": lambda m, w: F.group_norm(m, 3, _weight(3), _weight(3)),
    "batch_norm_evaluated": lambda m, w: F.batch_norm(m, _weight(3), _weight(3) ** 2 + 0.1),
    "instance_norm": lambda m, w: F.instance_norm(m, eps=0.1) * m,
    "instance_norm_weight": lambda m, w: F.instance_norm(m, None, None, _weight(3), _weight(3)),
    "instance_norm_evaluated": lambda m, w: F.instance_norm(
        m, _weight(3), _weight(3) ** 2 + 0.1, use_input_stats=False
    ),
    "bilinear": lambda m, w: F.bilinear(m, w, _weight(5, 4, 4), _weight(5)),
    "bilinear_of_the_state": lambda m, w: F.bilinear(m, m[..., :3], _weight(2, 4, 3)),
    "local_response_norm": lambda m, w: F.local_response_norm(m, 2),
    "normalize": lambda m, w: F.normalize(m, dim=1),
    "cosine_similarity": lambda m, w: F.cosine_similarity(m, w, dim=2),
    "cosine_similarity_pairs": lambda m, w: F.cosine_similarity(m[:, :, None], w[:, None], dim=-1),
    "pairwise_distance": lambda m, w: F.pairwise_distance(m, w),
    "cdist": lambda m, w: torch.cdist(m, w),
    "cdist_1": lambda m, w: torch.cdist(m, w, p=1.0),
    # products
    "matmul": lambda m, w: m @ w.mT,
    "matmul_weight": lambda m, w: m @ _weight(4, 4),
    "matmul_per_head": lambda m, w: m[:, :, None] @ _weight(3, 4, 2),
    "square": lambda m, w: m[..., :3] @ m[..., :3],
    "bmm": lambda m, w: torch.bmm(m, w.mT),
    "baddbmm": lambda m, w: torch.baddbmm(w[..., :3], m, w.mT, beta=0.5, alpha=0.3),
    "addmm": lambda m, w: torch.addmm(_weight(5), m.flatten(1), _weight(12, 5)),
    "einsum": lambda m, w: torch.einsum("nij,nkj,nk->ni", m, w, w[..., 0]),
    "einsum_weight": lambda m, w: torch.einsum("nij,kij->nk", m, _weight(5, 3, 4)),
    "outer": lambda m, w: m[:, 0, :, None] * w[:, 0, None, :],
    "tensordot": lambda m, w: torch.tensordot(m, _weight(4, 2), dims=([2], [0])),
    "kron": lambda m, w: torch.kron(_weight(2, 2), m[:, 0, :2]).view(2, -1, 2, 2).transpose(0, 1),
    "linear": lambda m, w: F.linear(m, _weight(5, 4), _weight(5)),
    "chain_matmul": lambda m, w: linalg.multi_dot([m.flatten(1), _weight(12, 3), _weight(3, 5)]),
    "cross": lambda m, w: linalg.cross(m[..., :3], w[..., :3]),
    "vecdot": lambda m, w: linalg.vecdot(m, w),
    # convolutions, windows
    "conv1d": lambda m, w: F.conv1d(m, _weight(2, 3, 2), _weight(2)),
    "conv1d_depthwise": lambda m, w: F.conv1d(m, _weight(3, 1, 3), padding=1, groups=3),
    "conv2d": lambda m, w: F.conv2d(m[:, None], _weight(2, 1, 2, 2), padding=1),
    "conv_transpose1d": lambda m, w: F.conv_transpose1d(m, _weight(3, 2, 2), stride=2),
    "avg_pool1d": lambda m, w: F.avg_pool1d(m, 2),
    "max_pool1d": lambda m, w: F.max_pool1d(m, 2),
    "lp_pool1d": lambda m, w: F.lp_pool1d(m.abs() + 0.1, 2, 2),
    "adaptive_avg_pool1d": lambda m, w: F.adaptive_avg_pool1d(m, 3),
    "adaptive_max_pool1d": lambda m, w: F.adaptive_max_pool1d(m, 2),
    "avg_pool2d": lambda m, w: F.avg_pool2d(m[:, None], 2, 1),
    "max_pool2d": lambda m, w: F.max_pool2d(m[:, None], 2, 1),
    "interpolate": lambda m, w: F.interpolate(m, 6, mode="linear"),
    "interpolate_nearest": lambda m, w: F.interpolate(m, 6),
    "interpolate_bilinear": lambda m, w: F.interpolate(m[:, None], (2, 5), mode="bilinear"),
    "pad": lambda m, w: F.pad(m, (1, 2), value=0.3),
    "pad_reflect": lambda m, w: F.pad(m, (1, 2), mode="reflect"),
    "pad_replicate": lambda m, w: F.pad(m, (2, 1), mode="replicate"),
    "pad_circular": lambda m, w: F.pad(m, (1, 1), mode="circular"),
    "unfold": lambda m, w: m.unfold(2, 2, 1),
    "im2col": lambda m, w: F.unfold(m[:, None], (2, 2)),
    "col2im": lambda m, w: F.fold(m[:, :, :2].mT.reshape(-1, 2, 3), (1, 4), (1, 2)),
    "pixel_shuffle": lambda m, w: F.pixel_shuffle(m.view(-1, 4, 1, 3), 2),
    "channel_shuffle": lambda m, w: torch.channel_shuffle(m.view(-1, 4, 3), 2),
    "grid_sample": lambda m, w: F.grid_sample(
        m[:, None], w.sin()[..., :2].unsqueeze(1), align_corners=False
    ),
    # moves
    "roll": lambda m, w: m.roll((1, 2), (1, 2)),
    "flip": lambda m, w: m.flip(1, 2),
    "rot90": lambda m, w: torch.rot90(m, 1, (1, 2)),
    "tril": lambda m, w: m.tril(),
    "triu": lambda m, w: m.triu(1),
    "diagonal": lambda m, w: m.diagonal(dim1=1, dim2=2),
    "diag_embed": lambda m, w: m[:, 0].diag_embed(),
    "diagonal_scatter": lambda m, w: torch.diagonal_scatter(m, w[:, 0, :3], 0, 1, 2),
    "select_scatter": lambda m, w: torch.select_scatter(m, w[:, 0], 1, 2),
    "slice_scatter": lambda m, w: torch.slice_scatter(w, m[:, :2], 1, 1, 3),
    "as_strided": lambda m, w: m.as_strided((len(m), 4), (12, 3)),
    "as_strided_overlapping": lambda m, w: m.as_strided((len(m), 3, 2), (12, 1, 1)),
    "tile": lambda m, w: m.tile(1, 2, 1),
    "repeat_interleave": lambda m, w: m.repeat_interleave(2, 2),
    "movedim": lambda m, w: m.movedim(2, 1).flatten(1),
    "cat": lambda m, w: torch.cat([m, w.flip(2)], 1),
    "stack": lambda m, w: torch.stack([m, w], 2),
    "hstack": lambda m, w: torch.hstack([m, w]),
    "unbind": lambda m, w: torch.stack(m.unbind(2)[::-1], 1),
    "block_diag": lambda m, w: torch.cat([F.pad(m, (0, 4)), F.pad(w, (4, 0))], 1),
    "combinations": lambda m, w: m[:, :, None] - m[:, None],
    "expand": lambda m, w: m[:, :1].expand(-1, 3, -1) * w,
    # indices
    "gather": lambda m, w: m.gather(2, torch.tensor([[[0, 2, 2, 1]]]).expand(len(m), 3, 4)),
    "take_along_dim": lambda m, w: m.take_along_dim(_order(w), 2),
    "index_select": lambda m, w: m.index_select(2, torch.tensor([3, 0, 0])),
    "index": lambda m, w: m[:, [2, 0], [1, 3]],
    "index_add": lambda m, w: m.index_add(1, torch.tensor([0, 0, 2]), w),
    "index_copy": lambda m, w: m.index_copy(2, torch.tensor([1, 3]), w[..., :2]),
    "index_fill": lambda m, w: m.index_fill(1, torch.tensor([1]), 0.3) * w,
    "index_put": lambda m, w: m.index_put((torch.arange(len(m)), torch.tensor(1)), w[:, 0]),
    "scatter": lambda m, w: m.scatter(2, _order(w)[..., :2], w[..., :2]),
    "scatter_add": lambda m, w: w.scatter_add(1, torch.zeros_like(m, dtype=torch.int64), m),
    "scatter_reduce": lambda m, w: w.scatter_reduce(2, _order(m) // 2, m, "mean"),
    "scatter_amax": lambda m, w: w.scatter_reduce(2, _order(m) // 2, m, "amax"),
    "masked_scatter": lambda m, w: m.masked_scatter(torch.ones_like(m, dtype=torch.bool), w) * m,
    "where": lambda m, w: torch.where(m.sum(2, keepdim=True) > 0, m, w),
    "embedding": lambda m, w: F.embedding(_order(m), _weight(4, 2)) * m[..., None],
    "written": _written,
    "written_without_grad": _without_grad,
    "power_in_place": lambda m, w: (m * 1.5).pow_(2).mul_(w),
    # linear algebra
    "inv": lambda m, w: linalg.inv(_symmetric(m)),
    "solve": lambda m, w: linalg.solve(_symmetric(m), w),
    "solve_triangular": lambda m, w: linalg.solve_triangular(_symmetric(m).tril(), w, upper=False),
    "det": lambda m, w: linalg.det(_symmetric(m)),
    "slogdet": lambda m, w: linalg.slogdet(_symmetric(m))[1],
    "logdet": lambda m, w: torch.logdet(_symmetric(m)),
    "cholesky": lambda m, w: linalg.cholesky(_symmetric(m)),
    "cholesky_solve": lambda m, w: torch.cholesky_solve(w, linalg.cholesky(_symmetric(m))),
    "qr": lambda m, w: linalg.qr(_symmetric(m))[1],
    "eigvalsh": lambda m, w: linalg.eigvalsh(_symmetric(m)),
    "svdvals": lambda m, w: linalg.svdvals(m),
    "pinv": lambda m, w: linalg.pinv(m),
    "lstsq": lambda m, w: linalg.lstsq(_symmetric(m), w).solution,
    "matrix_exp": lambda m, w: linalg.matrix_exp(0.3 * m[..., :3]),
    "matrix_power": lambda m, w: linalg.matrix_power(m[..., :3], 3),
    "matrix_norm": lambda m, w: linalg.matrix_norm(m),
    "nuclear_norm": lambda m, w: linalg.matrix_norm(m, "nuc"),
    "trace": lambda m, w: m.diagonal(dim1=1, dim2=2).sum(1),
    # Fourier transforms and complex numbers
    "fft": lambda m, w: _real(torch.fft.fft(m)),
    "ifft": lambda m, w: _real(torch.fft.ifft(m, norm="ortho")),
    "rfft": lambda m, w: _real(torch.fft.rfft(m)),
    "irfft": lambda m, w: torch.fft.irfft(torch.fft.rfft(m) * torch.fft.rfft(w), n=4),
    "rfft2": lambda m, w: _real(torch.fft.rfft2(m)),
    "fftn": lambda m, w: torch.fft.fftn(m, dim=(1, 2)).abs(),
    "hfft": lambda m, w: torch.fft.hfft(_complex(m), n=3),
    "fftshift": lambda m, w: torch.fft.fftshift(m, dim=2),
    "complex_product": lambda m, w: _real(_complex(m) * _complex(w)),
    "complex_quotient": lambda m, w: _real(_complex(m) / (_complex(w) + 2)),
    "complex_matmul": lambda m, w: _real(_complex(m) @ _complex(w).mH),
    "complex_tanh": lambda m, w: _real(torch.tanh(_complex(m))),
    "complex_exp": lambda m, w: _real(torch.exp(1j * m)),
    "polar": lambda m, w: _real(torch.polar(w.abs(), m)),
    "angle": lambda m, w: _complex(m).angle(),
    "complex_abs": lambda m, w: _complex(m).abs(),
    "complex_parts": lambda m, w: _complex(m).real * _complex(m).conj().imag,
    "complex": lambda m, w: torch.complex(m, w).prod(2).real,
    # functions of the kind of losses, and special ones
    "smooth_l1": lambda m, w: F.smooth_l1_loss(m, w, reduction="none"),
    "huber": lambda m, w: F.huber_loss(m, w, reduction="none", delta=0.4),
    "mse": lambda m, w: F.mse_loss(m, w, reduction="none"),
    "binary_cross_entropy": lambda m, w: F.binary_cross_entropy_with_logits(
        m, w.sigmoid(), reduction="none"
    ),
    "kl_div": lambda m, w: F.kl_div(m, w.softmax(2), reduction="none"),
    "cross_entropy": lambda m, w: F.cross_entropy(m, w.softmax(1), reduction="none"),
    "nll": lambda m, w: F.nll_loss(m, w.detach().argmax(1), reduction="none"),
    "lgamma": lambda m, w: torch.lgamma(m.abs() + 0.5),
    "digamma": lambda m, w: torch.digamma(m.abs() + 0.5),
    "erfinv": lambda m, w: torch.erfinv(m.tanh() * 0.9),
    "i0": lambda m, w: torch.i0(m),
    "ndtr": lambda m, w: torch.special.ndtr(m),
    "log_ndtr": lambda m, w: torch.special.log_ndtr(m),
    "entr": lambda m, w: torch.special.entr(m.abs() + 0.1),
    "xlog1py": lambda m, w: torch.special.xlog1py(m, w.abs()),
    "erfcx": lambda m, w: torch.special.erfcx(m),
    "attention": lambda m, w: F.scaled_dot_product_attention(m, w, m),
}
REFUSED = {
    "mask": (lambda m, w: m[:, torch.tensor([True, False, True])], "picks entries by a mask"),
    "mask of the state": (lambda m, w: m[m > 0].sum() * m, "picks entries by a mask"),
    "nonzero": (lambda m, w: m.flatten(1)[(m > 0).nonzero()[:, 0]], None),
    "rrelu": (lambda m, w: F.rrelu(m), "random operation"),
    "batch_norm": (lambda m, w: F.batch_norm(m, None, None, training=True), "mixes the rows"),
    "item": (lambda m, w: m * float(m[0, 0, 0].detach()), "reads the value of a tensor"),
    "data": (lambda m, w: _written_as_data(m), "operation clamp_ at"),
}
assert len(OPERATIONS) >= 150
