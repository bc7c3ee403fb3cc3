"""Device functions that more than one kernel uses.

Gluon compiles `relu`, `activate`, `scale_and_shift` and `maximum`, too (`hopper.py`). They call no other function of
ours, so that it can where these are interpreted.
"""

import triton
import triton.language as tl


@triton.jit
def relu(x):
    """ReLU in which NaN stays, as in `activate`."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """A `values.Activation` of x in fp32, whose NaN and infinities come out as in PyTorch.

    In front of a conversion to 16 bits ptxas makes ReLU a part of that, so it costs no instruction.

    GELU is x times the normal distribution's integral, within 2e-7: a polynomial fits the binary logarithm of its tail.
    tl.erf would take twice the instructions, and so many registers that large tiles would spill.
    """
    NAME: tl.constexpr = ACTIVATION[0]
    if NAME == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "relu6":
        x = tl.minimum(tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "leaky_relu":
        x = tl.where(x > 0, x, x * ACTIVATION[1])
    elif NAME == "hardswish":
        x *= tl.where(x < -3, 0.0, tl.where(x > 3, 1.0, (x + 3) * (1 / 6)))
    elif NAME == "silu":
        x /= 1 + tl.exp(-x)
    elif NAME == "gelu":
        a = tl.abs(x)
        log = (((-2.8349127e-6 * a + 3.9377690e-5) * a - 1.8618024e-4) * a - 1.3693637e-4) * a + 7.0634200e-3
        log = (((log * a - 5.2496180e-2) * a - 4.5920819e-1) * a - 1.1511052) * a - 1
        tail = tl.exp2(log)
        x *= tl.where(x < 0, tail, 1 - tail)
    return x


@triton.jit
def sum_partials(
    acc, partials_ptr, semaphores_ptr, tile, split, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Hand in this program's partial sum of a tile, fp32 [BLOCK_M, BLOCK_K]; the last to do so gets the sum and True.

    Partials are summed in the order of their splits, so the result does not depend on who is last. The barrier matters:
    nothing else orders a partial's stores before the semaphore that announces them. The last one leaves it at zero.
    """
    offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    partials = partials_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_K)
    tl.store(partials + split * (BLOCK_M * BLOCK_K) + offs, acc)
    tl.debug_barrier()
    last = tl.atomic_add(semaphores_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    if last:
        tl.store(semaphores_ptr + tile, 0)
        acc = tl.load(partials + offs, cache_modifier=".cg")
        for i in range(1, SPLIT_K):
            acc += tl.load(partials + i * (BLOCK_M * BLOCK_K) + offs, cache_modifier=".cg")
    return acc, last


@triton.jit
def scale_and_shift(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, offs_k, mask_k):
    """Both fp32, in the layout of `offs_k`, such that batch norm with running statistics is `x * scale + shift`.

    Square root and division are the correctly rounded ones: the approximate forms flush denormal variances to zero.
    """
    mean = tl.load(mean_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + offs_k, mask=mask_k, other=1.0).to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    if bn_weight_ptr is not None:
        scale *= tl.load(bn_weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    # In PyTorch's order: -mean * scale + bias has other signs of zero.
    shift = 0.0 - mean * scale
    if bn_bias_ptr is not None:
        shift = tl.load(bn_bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32) - mean * scale
    return scale, shift


@triton.jit
def spread(x, BLOCK_K: tl.constexpr):
    """`x` [BLOCK_K], for use as a row of a tile.

    The gather moves nothing (element i goes to place i); it lets the compiler spread the vector over the threads once,
    instead of doubling the tile's registers.
    """
    return tl.gather(x, tl.arange(0, BLOCK_K), 0)


@triton.jit
def batch_norm_scale_shift(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, offs_k, mask_k, BLOCK_K: tl.constexpr):
    """`scale_and_shift`, both [BLOCK_K] and spread."""
    scale, shift = scale_and_shift(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, offs_k, mask_k)
    return spread(scale, BLOCK_K), spread(shift, BLOCK_K)


@triton.jit
def maximum(a, b):
    """Elementwise maximum in which NaN wins, as in PyTorch's max pooling."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
