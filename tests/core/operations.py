"""The operations a cell may use on its state, each as a function of two recurrent values.

The first value comes from the operation's domain, where it is defined and smooth nearly everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

DOMAINS = {
    "real": lambda u: u,
    "wide": lambda u: 4 * u,  # beyond the bends of relu6, hardtanh and the like
    "positive": lambda u: u * u + 0.1,
    "above1": lambda u: u * u + 1.1,
    "unit": lambda u: 1.8 * u / (1 + u * u),  # (-0.9, 0.9)
    "open01": lambda u: 0.5 + 0.9 * u / (1 + u * u),  # (0.05, 0.95)
}


@dataclass(frozen=True)
class Operation:
    name: str
    function: Callable
    domain: str = "real"
    rtol: float = 0.0  # when the operation is not exact in the type of its operands


def _table(domain, **functions):
    return [Operation(n, f, domain) for n, f in functions.items()]


def _narrow(dtype, **functions):
    eps = torch.finfo(dtype).eps
    return [Operation(n, f, rtol=8 * eps) for n, f in functions.items()]


def _in_place(u, w):
    t = u * w
    t.add_(1.0).mul_(w).sigmoid_()
    return t


def _masked(u, w):
    t = u * w
    t[w > 0.3] = 0.25
    return t


OPERATIONS = [
    *_table(
        "real",
        add=lambda u, w: u + w,
        add_alpha=lambda u, w: torch.add(u, w, alpha=0.3),
        sub=lambda u, w: u - w,
        sub_alpha=lambda u, w: torch.sub(u, w, alpha=0.3),
        rsub=lambda u, w: 1 - u,
        rsub_alpha=lambda u, w: torch.rsub(u, w, alpha=0.3),
        mul=lambda u, w: u * w,
        neg=lambda u, w: -u,
        positive=lambda u, w: +u * w,
        true_div=lambda u, w: u / (w * w + 1),
        div_number=lambda u, w: u / 3,
        number_div=lambda u, w: 3 / (u * u + 1),
        floor_divide=lambda u, w: u.detach() // (w.detach() ** 2 + 0.3) + u,
        floor_divide_number=lambda u, w: u.detach() // 0.1 + u,
        div_floor=lambda u, w: torch.div(u, w * w + 0.3, rounding_mode="floor") + u,
        div_trunc=lambda u, w: torch.div(u, w * w + 0.3, rounding_mode="trunc") + u,
        remainder=lambda u, w: u % (w * w + 0.3),
        remainder_negative=lambda u, w: torch.remainder(u, -0.7),
        number_remainder=lambda u, w: torch.remainder(2.0, w.detach() ** 2 + 0.3) * u,
        fmod=lambda u, w: torch.fmod(u, w * w + 0.3),
        fmod_number=lambda u, w: torch.fmod(u, 0.7),
        pow2=lambda u, w: u**2,
        pow3=lambda u, w: u**3,
        pow0=lambda u, w: u**0 + u,
        number_pow=lambda u, w: 2.0**u,
        square=lambda u, w: u.square(),
        exp=lambda u, w: torch.exp(u),
        exp2=lambda u, w: torch.exp2(u),
        expm1=lambda u, w: torch.expm1(u),
        sigmoid=lambda u, w: torch.sigmoid(u),
        tanh=lambda u, w: torch.tanh(u),
        softplus=lambda u, w: F.softplus(u),
        softplus_beta=lambda u, w: F.softplus(u, beta=4, threshold=3),
        logsigmoid=lambda u, w: F.logsigmoid(u),
        gelu=lambda u, w: F.gelu(u),
        gelu_tanh=lambda u, w: F.gelu(u, approximate="tanh"),
        silu=lambda u, w: F.silu(u),
        mish=lambda u, w: F.mish(u),
        erf=lambda u, w: torch.erf(u),
        erfc=lambda u, w: torch.erfc(u),
        sin=lambda u, w: torch.sin(u),
        cos=lambda u, w: torch.cos(u),
        sinh=lambda u, w: torch.sinh(u),
        cosh=lambda u, w: torch.cosh(u),
        asinh=lambda u, w: torch.asinh(u),
        atan=lambda u, w: torch.atan(u),
        atan2=lambda u, w: torch.atan2(u, w * w + 0.1),
        sinc=lambda u, w: torch.sinc(u),
        tanhshrink=lambda u, w: F.tanhshrink(u),
        softsign=lambda u, w: F.softsign(u),
        deg2rad=lambda u, w: torch.deg2rad(u),
        rad2deg=lambda u, w: torch.rad2deg(u),
        abs=lambda u, w: u.abs(),
        sign=lambda u, w: torch.sign(u) * w,
        sgn=lambda u, w: torch.sgn(u) * w,
        signbit=lambda u, w: torch.where(torch.signbit(u), u, w),
        heaviside=lambda u, w: torch.heaviside(u.detach(), w.detach()) * w,
        minimum=lambda u, w: torch.minimum(u, w),
        maximum=lambda u, w: torch.maximum(u, w),
        maximum_zero=lambda u, w: torch.maximum(u, torch.zeros_like(u)),
        min_pair=lambda u, w: torch.min(u, w),
        max_pair=lambda u, w: torch.max(u, w),
        fmin=lambda u, w: torch.fmin(u, w),
        fmax=lambda u, w: torch.fmax(u, w),
        clamp=lambda u, w: u.clamp(-0.5, 0.6),
        clamp_min=lambda u, w: u.clamp(min=-0.5),
        clamp_max=lambda u, w: u.clamp(max=0.6),
        clip=lambda u, w: torch.clip(u, -0.5, 0.6),
        clamp_tensor=lambda u, w: u.clamp(-w.abs(), w.abs() + 0.3),
        clamp_min_tensor=lambda u, w: torch.clamp(u, min=w),
        where=lambda u, w: torch.where(u > w, u * w, w),
        where_number=lambda u, w: torch.where(u > 0.1, u, 0.5),
        where_both_numbers=lambda u, w: torch.where(u > 0.1, 0.25, 0.5) * w,
        lt=lambda u, w: torch.where(u < w, u, -w),
        le=lambda u, w: torch.where(u <= w, u, -w),
        gt=lambda u, w: torch.where(u > 0.2, u, -w),
        ge=lambda u, w: torch.where(u >= 0.2, u, -w),
        eq=lambda u, w: torch.where(torch.round(u) == 0, u, -w),
        ne=lambda u, w: torch.where(torch.round(u) != torch.round(w), u, -w),
        mask_product=lambda u, w: (u > 0) * w,
        mask_sum=lambda u, w: ((u > 0).int() + (w > 0).to(torch.int64)) * w,
        mask_float=lambda u, w: (u > w).float() * w,
        mask_number=lambda u, w: (u > w) * 0.3 * w,
        mask_numbers=lambda u, w: torch.where(u > w, 0.3, 0.7) * w,
        mask_type_as=lambda u, w: (u > w).type_as(u) * w,
        logical_and=lambda u, w: torch.where(torch.logical_and(u > 0, w > 0), u, w),
        logical_or=lambda u, w: torch.where(torch.logical_or(u > 0, w > 0), u, w),
        logical_xor=lambda u, w: torch.where(torch.logical_xor(u > 0, w > 0), u, w),
        logical_not=lambda u, w: torch.where(torch.logical_not(u > 0), u, w),
        logical_number=lambda u, w: torch.where(torch.logical_not(torch.relu(u)), u, w),
        bitwise_and=lambda u, w: torch.where((u > 0) & (w > 0), u, w),
        bitwise_or=lambda u, w: torch.where((u > 0) | (w > 0), u, w),
        bitwise_xor=lambda u, w: torch.where((u > 0) ^ (w > 0), u, w),
        bitwise_not=lambda u, w: torch.where(~(u > 0), u, w),
        mask_where=lambda u, w: torch.where(torch.where(u > 0, w > 0, w < 0.1), u, w),
        masked_fill=lambda u, w: u.masked_fill(w > 0.3, 0.25),
        masked_fill_in_place=lambda u, w: (u * 1.5).masked_fill_(w > 0.3, 0.25),
        number_where_a_mask_holds=_masked,
        lerp=lambda u, w: torch.lerp(u, w, 0.3),
        lerp_far=lambda u, w: torch.lerp(u, w, 0.8),
        lerp_tensor=lambda u, w: torch.lerp(u, w, torch.sigmoid(u)),
        addcmul=lambda u, w: torch.addcmul(u, u, w, value=0.3),
        addcdiv=lambda u, w: torch.addcdiv(u, w, u * u + 1, value=0.3),
        floor=lambda u, w: torch.floor(3 * u) * w,
        ceil=lambda u, w: torch.ceil(3 * u) * w,
        trunc=lambda u, w: torch.trunc(3 * u) * w,
        fix=lambda u, w: torch.fix(3 * u) * w,
        round=lambda u, w: torch.round(3 * u) * w,
        round_decimals=lambda u, w: torch.round(u, decimals=1) * w,
        frac=lambda u, w: torch.frac(2 * u) * w,
        logaddexp=lambda u, w: torch.logaddexp(u, w),
        logaddexp2=lambda u, w: torch.logaddexp2(u, w),
        hypot=lambda u, w: torch.hypot(u, w),
        copysign=lambda u, w: torch.copysign(u, w),
        copysign_number=lambda u, w: torch.copysign(u, -1.0),
        nan_to_num=lambda u, w: torch.nan_to_num(torch.where(w > 0, u, torch.nan), nan=0.25),
        isnan=lambda u, w: torch.where(torch.isnan(u), w, u),
        isinf=lambda u, w: torch.where(torch.isinf(u), w, u),
        isfinite=lambda u, w: torch.where(torch.isfinite(u), u, w),
        isposinf=lambda u, w: torch.where(torch.isposinf(u), w, u),
        cast_double=lambda u, w: torch.tanh(u.double()).type_as(u),
        full_float=lambda u, w: torch.full(u.shape, 0.7) * u,
        cast_bool=lambda u, w: u.bool() * w,
        cast_long=lambda u, w: (3 * u).long() * w,
        cast_int=lambda u, w: (3 * u).int().to(u.dtype) * w,
        detach=lambda u, w: u.detach() * w,
        zeros_like=lambda u, w: torch.zeros_like(u) + u,
        ones_like=lambda u, w: torch.ones_like(u) - u,
        full_like=lambda u, w: torch.full_like(u, 0.7) * u,
        new_zeros=lambda u, w: u.new_zeros(u.shape) + u,
        new_full=lambda u, w: u.new_full(u.shape, 0.7) * u,
        number_tensor=lambda u, w: torch.tensor(0.7, dtype=u.dtype) * u,
        clone=lambda u, w: u.clone() * w,
        in_place=_in_place,
    ),
    *_table(
        "wide",
        relu=lambda u, w: F.relu(u),
        leaky_relu=lambda u, w: F.leaky_relu(u, 0.2),
        prelu=lambda u, w: F.prelu(u, torch.full((1,), 0.3, dtype=u.dtype)),
        elu=lambda u, w: F.elu(u, 1.3),
        celu=lambda u, w: F.celu(u, 1.3),
        selu=lambda u, w: F.selu(u),
        relu6=lambda u, w: F.relu6(u),
        hardtanh=lambda u, w: F.hardtanh(u, -2.0, 1.5),
        hardsigmoid=lambda u, w: F.hardsigmoid(u),
        hardswish=lambda u, w: F.hardswish(u),
        softshrink=lambda u, w: F.softshrink(u, 0.7),
        hardshrink=lambda u, w: F.hardshrink(u, 0.7),
        threshold=lambda u, w: F.threshold(u, 0.3, 0.1),
        logsigmoid_wide=lambda u, w: F.logsigmoid(u),
        softplus_wide=lambda u, w: F.softplus(5 * u),
    ),
    *_table(
        "positive",
        pow_half=lambda u, w: u**0.5,
        pow_fraction=lambda u, w: u**1.7,
        pow_minus1=lambda u, w: u**-1,
        pow_minus_half=lambda u, w: u**-0.5,
        pow_minus2=lambda u, w: u**-2,
        pow_tensor=lambda u, w: u**w,
        log=lambda u, w: torch.log(u),
        log2=lambda u, w: torch.log2(u),
        log10=lambda u, w: torch.log10(u),
        log1p=lambda u, w: torch.log1p(u),
        sqrt=lambda u, w: torch.sqrt(u),
        rsqrt=lambda u, w: torch.rsqrt(u),
        reciprocal=lambda u, w: torch.reciprocal(u),
        xlogy=lambda u, w: torch.xlogy(w, u),
        xlogy_number=lambda u, w: torch.xlogy(2.0, u),
    ),
    *_table("above1", acosh=lambda u, w: torch.acosh(u)),
    *_table(
        "unit",
        asin=lambda u, w: torch.asin(u),
        acos=lambda u, w: torch.acos(u),
        atanh=lambda u, w: torch.atanh(u),
        tan=lambda u, w: torch.tan(u),
    ),
    *_table("open01", logit=lambda u, w: torch.logit(u)),
    *_table("open01", logit_eps=lambda u, w: torch.logit(u, eps=0.2)),
    *_table(
        "real",
        cat_chunk=lambda u, w: torch.mul(*torch.cat([u, w], 1).chunk(2, 1)),
        stack_last=lambda u, w: torch.stack([u, w], 1).select(1, 0),
        split=lambda u, w: torch.cat([u, w], -1).split(u.shape[1], -1)[1] * u,
        slice=lambda u, w: torch.cat([u, w], -1)[:, u.shape[1] :] * u,
        unflatten=lambda u, w: torch.cat([u, w], -1).unflatten(-1, (2, -1)).tanh()[:, 1],
        view=lambda u, w: (u.view(*u.shape, 1) * w.unsqueeze(-1)).squeeze(-1),
        reshape_batch=lambda u, w: (u.reshape(len(u), 1, -1) * w[:, None]).flatten(1),
        stack_middle=lambda u, w: torch.sub(*torch.stack([u, w], 1).sigmoid().unbind(1)),
        expand=lambda u, w: (u.unsqueeze(1).expand(-1, 2, -1) * w.unsqueeze(1))[:, 0],
    ),
    # The loop itself rounds every step of these and of their gradients to the narrow type.
    *_narrow(torch.float32, cast_float=lambda u, w: torch.tanh(u.float() * 0.7).type_as(u) * w),
    *_narrow(torch.float16, cast_half=lambda u, w: (u.half() * 0.7 + 0.1).type_as(u) * w),
    *_narrow(torch.bfloat16, cast_bfloat16=lambda u, w: (u.bfloat16() * 0.7 + 0.1).type_as(u) * w),
]
assert len({o.name for o in OPERATIONS}) == len(OPERATIONS)
