"""Reference: refimpl.reference.attention.route, on a GPU: two launches for a few tokens.

Scores are compared as whole numbers, which holds for ties, zeros of either sign and NaN alike:

    key  oooooooo oooooooo oooooooo oooooooo  00000000 00000000 iiiiiiii iiiiiiii
         float32 bits, negative ones flipped  E - id: the lower id is the larger

No two keys are the same, so the largest is one expert, and NaN ranks below everything, as with the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from refimpl.config import DeepSeekConfig
from refimpl.kernels.e4m3_triton import INTERPRETED, as_float32

# `project` has a program for each ROWS experts of a token, `choose` one for each token: all its experts
# stand in a register tile [BG, BW], padded to powers of two, padding masked by `there`:
#
#                within a group 0 .. WIDTH - 1      .. BW
#     group 0    | e0      e1      ...         |  not there  |
#     group 1    | eW      eW+1    ...         |  not there  |
#     .. BG      |          not there                        |
# 128 programs for 256 experts: one token keeps all of a GPU's processors at work. The interpreter runs
# programs one after the other, and takes the longer the more they are.
ROWS = 64 if INTERPRETED.value else 2
FEW = 8  # tokens whose logits are faster made one by one than by a matrix product
NONE = tl.constexpr(-(1 << 63))  # below every key


@triton.jit
def keys(scores, place):
    """f32 and i32, one shape -> i64 that order as (score, place) do; NaN below all numbers."""
    # -0.0 becomes 0.0. Of negative floats the larger has the smaller bits: all but the sign are flipped, and
    # then integers order as the floats do.
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(scores != scores, -2147483648, order)
    return (order.to(tl.int64) << 32) | place.to(tl.int64)


@triton.jit
def score_of(key):
    """The f32 score in a key, i64 of any shape."""
    order = (key >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def exp_of_minus(x):
    """exp(-x), x f32 from zero on, any shape, to a few units in the last place. The chip's own exponential is
    that exact near zero only, so whole powers of two are taken out first.
    """
    size = -tl.minimum(x, 110.0)  # exp(-110) is zero
    whole = tl.floor(size * 1.4426950408889634 + 0.5)
    near = size - whole * 0.693359375 + whole * 2.12194440e-4  # ln 2 in two parts, the first of nine bits
    # 2^-159 is no float32, so the power is multiplied in halves, each a normal number.
    half = whole.to(tl.int32) >> 1
    other = whole.to(tl.int32) - half
    e = tl.exp(near) * ((half + 127) << 23).to(tl.float32, bitcast=True)
    return e * ((other + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), x f32 of any shape -> f32 of that shape. NaN stays NaN."""
    # With exp of negative numbers only, nothing overflows: 1 / (1 + e) for x >= 0, else e / (1 + e).
    e = exp_of_minus(tl.abs(x))
    y = tl.math.div_rn(tl.where(x >= 0, 1.0, e), 1.0 + e)
    return tl.where(x != x, x, y)


@triton.jit
def softmax(x, there):
    """Softmax over all numbers of x f32 [A, B] where `there`, bool [A, B], zero elsewhere -> f32 [A, B]; all
    NaN where there is a NaN or +inf.
    """
    # `tl.max` passes over NaN, and +inf leaves a gap of NaN (inf - inf): both are seen in `gap`, and make all
    # NaN in the last line.
    low = tl.where(there, x, float("-inf"))
    most = tl.max(tl.max(low, axis=1), axis=0)
    gap = tl.where(there, most - x, 0.0)
    unknown = tl.max(tl.max((gap != gap).to(tl.int32), axis=1), axis=0)
    e = tl.where(there, exp_of_minus(gap), 0.0)
    whole = tl.sum(tl.sum(e, axis=1), axis=0)
    y = tl.math.div_rn(e, tl.broadcast_to(whole, e.shape))
    return tl.where(unknown > 0, float("nan"), y)


@triton.jit(do_not_specialize=["E"])
def project(x, weight, logits, E, D, x_row, ROWS: tl.constexpr, BD: tl.constexpr):
    """ROWS experts of one token: x f32 [T, D], rows `x_row` apart, weight bf16 or f32 [E, D] -> logits f32
    [T, E].
    """
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # BD sums a row, added up behind the loop: one order, however many tokens there are.
    total = tl.zeros((ROWS, BD), tl.float32)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)
        numbers = tl.load(x + token * x_row + columns, mask=columns < D, other=0.0)
        inside = (rows < E)[:, None] & (columns < D)[None, :]
        w = tl.load(weight + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)
        total += as_float32(w) * numbers[None, :]
    tl.store(logits + token * E + rows, tl.sum(total, axis=1), mask=rows < E)


@triton.jit
def choose(
    logits,
    bias,
    ids,
    weights,
    scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
    CHOSEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PAIRS: tl.constexpr,
    BG: tl.constexpr,
    BW: tl.constexpr,
    BA: tl.constexpr,
):
    """One token: logits f32 [T, GROUPS * WIDTH], bias f32 or bf16 [GROUPS * WIDTH] -> ids i64 [T, CHOSEN] and
    weights f32 [T, CHOSEN], best first. BG, BW and BA: powers of two from GROUPS, WIDTH and CHOSEN on.
    """
    token = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, BG)
    within = tl.arange(0, BW)
    experts = groups[:, None] * WIDTH + within[None, :]  # [BG, BW]
    there = (groups < GROUPS)[:, None] & (within < WIDTH)[None, :]
    products = tl.load(logits + token * (GROUPS * WIDTH) + experts, mask=there, other=0.0)
    if SOFTMAX:
        affinity = softmax(products, there)
    else:
        affinity = sigmoid(products)
    # The bias steers the choice alone; weights are made of `affinity`.
    biased = affinity + as_float32(tl.load(bias + experts, mask=there, other=0.0))
    place = GROUPS * WIDTH - experts
    ranked = tl.where(there, keys(biased, place), NONE)
    best = tl.max(ranked, axis=1)  # [BG]
    # The best two of a group: `ranked` has no two equal keys, so exactly one is taken out for the second.
    group_scores = score_of(best)
    if PAIRS:
        group_scores += score_of(tl.max(tl.where(ranked == best[:, None], NONE, ranked), axis=1))
    unknown = tl.max((there & (biased != biased)).to(tl.int32), axis=1)
    group_scores = tl.where(unknown > 0, float("nan"), group_scores)
    left = tl.where(groups < GROUPS, keys(group_scores, GROUPS - groups), NONE)
    kept = tl.zeros((BG,), tl.int32)
    # Marks the best group left, and takes it out, KEPT times.
    for _ in range(KEPT):
        hit = left == tl.max(left, axis=0)
        kept = tl.where(hit, 1, kept)
        left = tl.where(hit, NONE, left)
    # Experts of other groups stay in the ranking, at -inf, should CHOSEN be more than the kept groups have.
    eligible = tl.where(kept[:, None] > 0, biased, float("-inf"))
    ranked = tl.where(there, keys(eligible, place), NONE)
    slots = tl.arange(0, BA)
    chosen = tl.zeros((BA,), tl.int64)
    shares = tl.zeros((BA,), tl.float32)
    for slot in range(CHOSEN):
        first = tl.max(tl.max(ranked, axis=1), axis=0)
        hit = ranked == first
        # One number is not zero: a sum is how a register tile gives out one element.
        share = tl.sum(tl.sum(tl.where(hit, affinity, 0.0), axis=1), axis=0)
        chosen = tl.where(slots == slot, GROUPS * WIDTH - (first & 0xFFFFFFFF), chosen)
        shares = tl.where(slots == slot, share, shares)
        ranked = tl.where(hit, NONE, ranked)
    if NORMALIZE:
        whole = tl.sum(shares, axis=0) + 1e-20
        shares = tl.math.div_rn(shares, tl.broadcast_to(whole, shares.shape))
    at = token * CHOSEN + slots
    tl.store(ids + at, chosen, mask=slots < CHOSEN)
    tl.store(weights + at, shares * scale, mask=slots < CHOSEN)


def few_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x f32 [T, D] times the transpose of weight [E, D], bf16 or f32 -> f32 [T, E], each token by itself."""
    x, weight = x if x.stride(-1) == 1 else x.contiguous(), weight.contiguous()
    (tokens, columns), experts = x.shape, len(weight)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    project[(triton.cdiv(experts, ROWS), tokens)](
        x,
        weight,
        logits,
        experts,
        columns,
        x.stride(0),
        ROWS=ROWS,
        BD=min(1024, triton.next_power_of_2(columns)),
    )
    return logits


def choices(
    logits: torch.Tensor, bias: torch.Tensor, config: DeepSeekConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """What refimpl.reference.attention.route makes of logits f32 [T, E]: ids int64 [T, A], weights f32
    [T, A].
    """
    c = config
    width, shape = logits.shape[1] // c.n_group, (len(logits), c.num_experts_per_tok)
    ids = torch.empty(shape, dtype=torch.int64, device=logits.device)
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if ids.numel():
        choose[(len(logits),)](
            logits.contiguous(),
            bias.contiguous(),
            ids,
            weights,
            float(c.routed_scaling_factor),
            **constants(c, width),
            num_warps=1 if logits.shape[1] <= 256 else 4,
        )
    return ids, weights


def constants(c: DeepSeekConfig, width: int) -> dict[str, int | bool]:
    """What `choose` is compiled with, for groups of `width` experts."""
    return {
        "GROUPS": c.n_group,
        "WIDTH": width,
        "KEPT": c.topk_group,
        "CHOSEN": c.num_experts_per_tok,
        "NORMALIZE": c.norm_topk_prob,
        "SOFTMAX": c.scoring_func == "softmax",
        "PAIRS": width > 1 and c.topk_method != "group_limited_greedy",
        "BG": triton.next_power_of_2(c.n_group),
        "BW": triton.next_power_of_2(width),
        "BA": triton.next_power_of_2(c.num_experts_per_tok),
    }
