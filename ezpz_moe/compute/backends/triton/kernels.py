"""Triton kernels: products of rows with their expert's matrix, and gradients of the weights.

**Which rows a program computes.** Counts stay on the device, so the grid has to be bounded by sizes
that the host knows. Cut into tiles of B rows, expert e with rows ``start : end`` needs
``ceil((end - start) / B)`` of them. It gets the *slots* from ``start // B + e`` on: since
``a // B + ceil(b / B) <= (a + b) // B + 1``, they end before those of the next expert begin. The
expert of a slot is then the number of first slots at or before it: one reduction over E numbers, no
prefix sum, no map in memory, no earlier launch. Tail rows are the rows of an expert number E; its
product has no terms, so zeros are written there. R // B + E + 1 slots are enough for all; those
without rows end at once.

**Routed layers.** With TOP_K above 0, row r is choice ``ORDER[r]`` of the [T, K] choices of all
tokens, and so of token ``ORDER[r] // TOP_K``. Rows of x and of the output's gradient are then read
where the tokens are, and scores where the choices are. What is to be summed by token is written
where the choices are, too: the K rows of a token become neighbours, and no index is needed to add
them up. With TOP_K = 0 rows are read and written in place, and ORDER and SCORES are not read.

**In which order.** Consecutive programs share tiles: GROUP slots times all columns, slots first.
That keeps an expert's matrix and the rows in the L2 cache.

Element offsets are 64 bits wide, row numbers 32. Rows, columns and terms that a tile has too many
of are masked and never read: memory there may hold NaN. Every output is written by one program,
once: no atomics, and the same bits on a rerun.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`. ``a_r`` is the stride of A in its
dimension r, and so on; offs are the inclusive offsets of the experts' rows.
"""

import triton
import triton.language as tl

from ezpz_moe.compute.backends.triton import tiles
from ezpz_moe.compute.backends.triton.tuning import tuned

# Columns of a tile that are stored at once, and computed with: a whole tile of several tensors
# needs more registers than there are.
PIECE = tl.constexpr(32)


@triton.jit
def _rows_of(slot, offs, E, R, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return a slot's expert, its first row and the end of its rows. Expert E owns the tail."""
    # An expert starts where the one before it ends. Expert 0, which has none before it, is masked
    # to 0; expert E starts where the last one ends.
    experts = tl.arange(0, BLOCK_E)
    starts = tl.load(offs + experts - 1, (experts > 0) & (experts <= E), other=0).to(tl.int32)
    # First slots rise strictly with e, even for experts without rows, so counting those at or
    # before `slot` finds the one that owns it.
    begun = (starts // BLOCK_R + experts <= slot) & (experts <= E)
    expert = tl.sum(begun.to(tl.int32), 0) - 1
    start = tl.load(offs + expert - 1, expert > 0, other=0).to(tl.int32)
    end = tl.load(offs + expert, expert < E, other=0).to(tl.int32)
    end = tl.where(expert < E, end, R)
    return expert, start + (slot - start // BLOCK_R - expert) * BLOCK_R, end


@triton.jit
def _place(tile, num_slots, num_columns, GROUP: tl.constexpr):
    """Return a tile's slot and column, in the launch order of the module's text."""
    per_group = GROUP * num_columns
    first = tile // per_group * GROUP
    size = tl.minimum(num_slots - first, GROUP)
    rest = tile % per_group
    return first + rest % size, rest // size


@triton.jit
def _at(base, i, j, stride_i, stride_j):
    """Return pointers to the elements (i, j) of a matrix."""
    return base + i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j


@triton.jit
def _choices(ORDER, rows, in_rows):
    """Return which choice each row is, int32."""
    return tl.load(ORDER + rows, in_rows, other=0).to(tl.int32)


@triton.jit
def _tokens(ORDER, rows, in_rows, TOP_K: tl.constexpr):
    """Return where to read each row: where its token is, or in place."""
    if TOP_K:
        return _choices(ORDER, rows, in_rows) // TOP_K
    else:  # noqa: RET505 - Triton compiles what follows a return
        return rows


@triton.jit
def _add_product(
    acc, A, B, places, in_rows, columns, K, N, a_r, a_k, b_k, b_n,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Return ``acc + A[places, :K] @ B[:K, columns]``; read nothing beyond the rows, K and N."""
    terms = tl.arange(0, BLOCK_K)
    a_at, b_at = _at(A, places, terms, a_r, a_k), _at(B, terms, columns, b_k, b_n)
    in_rows, in_columns = in_rows[:, None], (columns < N)[None, :]
    for k in range(0, K, BLOCK_K):
        # K is a multiple of the block: no mask along K, so loads can be vectorized.
        if EVEN_K:
            a = tl.load(a_at, in_rows, other=0.0)
            b = tl.load(b_at, in_columns, other=0.0)
        else:
            a = tl.load(a_at, in_rows & (terms < K - k)[None, :], other=0.0)
            b = tl.load(b_at, in_columns & (terms < K - k)[:, None], other=0.0)
        # ieee: the default, tf32, would miss the contract's bound in float32.
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_at += BLOCK_K * a_k
        b_at += BLOCK_K * b_k
    return acc


@tuned
# R changes with every step: specialized on its value, Triton would compile again whenever it
# becomes or stops being a multiple of 16.
@triton.jit(do_not_specialize=["R", "R_BUCKET"])
def multiply(
    A, B, A2, B2, BIAS, offs, ORDER, SCORES, C, E, R, R_BUCKET, K, N,
    a_r, a_k, b_e, b_k, b_n, a2_r, a2_k, b2_e, b2_k, b2_n, c_r, c_n,
    SECOND: tl.constexpr, BIASED: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Compute ``C[r] = A[r] @ B[e]``, plus ``A2[r] @ B2[e]`` if SECOND, for expert e's rows r.

    With TOP_K, C is written in the order of choices, and a bias is multiplied by their scores.
    """
    slot, column = _place(tl.program_id(0), R // BLOCK_R + E + 1, tl.cdiv(N, BLOCK_N), GROUP)
    expert, row, end = _rows_of(slot, offs, E, R, BLOCK_E, BLOCK_R)
    if row < end:
        rows = row + tl.arange(0, BLOCK_R)
        in_rows = rows < end
        columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
        e = expert.to(tl.int64)
        # The tail's sum has no terms: zeros are stored. B + E * b_e is beyond the weights, but is
        # then never read.
        terms = tl.where(expert < E, K, 0)
        # Sums are in float32 in every dtype, and are rounded once, when they are stored.
        acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        acc = _add_product(
            acc, A, B + e * b_e, rows, in_rows, columns, terms, N, a_r, a_k, b_k, b_n,
            BLOCK_K, EVEN_K,
        )  # fmt: skip
        if SECOND:
            acc = _add_product(
                acc, A2, B2 + e * b2_e, rows, in_rows, columns, terms, N, a2_r, a2_k, b2_k, b2_n,
                BLOCK_K, EVEN_K,
            )  # fmt: skip
        places = rows
        if TOP_K:
            places = _choices(ORDER, rows, in_rows)
        if BIASED:
            bias = tiles.bias(BIAS, expert, columns, E, N)[None, :]
            if TOP_K:
                bias *= tl.load(SCORES + places).to(tl.float32)[:, None]
            acc += bias
        inside = in_rows[:, None] & (columns < N)[None, :]
        tl.store(_at(C, places, columns, c_r, c_n), acc.to(C.dtype.element_ty), inside)


@triton.jit
def _store_gate_and_up(
    gate, up, score, GATE, UP, HIDDEN, rows, in_rows, column, N,
    HIDDEN_TOO: tl.constexpr, SCORED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Store a tile of gate and up, from a column on, and ``score * hidden``."""
    if gate.shape[1] > PIECE:
        left, right = tiles.halves(gate)
        left_up, right_up = tiles.halves(up)
        half: tl.constexpr = gate.shape[1] // 2
        _store_gate_and_up(
            left, left_up, score, GATE, UP, HIDDEN, rows, in_rows, column, N,
            HIDDEN_TOO, SCORED, GATED, ACTIVATION,
        )  # fmt: skip
        _store_gate_and_up(
            right, right_up, score, GATE, UP, HIDDEN, rows, in_rows, column + half, N,
            HIDDEN_TOO, SCORED, GATED, ACTIVATION,
        )  # fmt: skip
    else:
        columns = column + tl.arange(0, gate.shape[1])
        # All are contiguous, because they are new.
        at = rows.to(tl.int64)[:, None] * N + columns[None, :]
        inside = in_rows[:, None] & (columns < N)[None, :]
        tl.store(GATE + at, gate.to(GATE.dtype.element_ty), inside)
        if GATED:
            tl.store(UP + at, up.to(UP.dtype.element_ty), inside)
        if HIDDEN_TOO:
            # From the float32 sums, not from the rounded gate and up.
            hidden = tiles.activated(gate, ACTIVATION)
            if GATED:
                hidden *= tiles.factor(up, ACTIVATION)
            if SCORED:
                hidden *= score[:, None]
            tl.store(HIDDEN + at, hidden.to(HIDDEN.dtype.element_ty), inside)


@tuned
@triton.jit(do_not_specialize=["R", "R_BUCKET"])
def gate_and_up(
    X, W1, W3, B1, B3, offs, ORDER, SCORES, GATE, UP, HIDDEN, E, R, R_BUCKET, K, N,
    x_r, x_k, w1_e, w1_n, w1_k, w3_e, w3_n, w3_k,
    HIDDEN_TOO: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Compute ``x @ w1.T``, ``x @ w3.T`` and the hidden rows, reading x once. [R, N] each.

    Biases are added first. Unless GATED there is no w3, and UP is not written. With TOP_K, x is
    [T, D], and the hidden rows are multiplied by the choice's score.

    The two products are written out instead of called: a tile of x is then loaded once.
    """
    slot, column = _place(tl.program_id(0), R // BLOCK_R + E + 1, tl.cdiv(N, BLOCK_N), GROUP)
    expert, row, end = _rows_of(slot, offs, E, R, BLOCK_E, BLOCK_R)
    if row < end:
        rows = row + tl.arange(0, BLOCK_R)
        columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
        terms = tl.arange(0, BLOCK_K)
        e = expert.to(tl.int64)
        x_at = _at(X, _tokens(ORDER, rows, rows < end, TOP_K), terms, x_r, x_k)
        w1_at = _at(W1 + e * w1_e, terms, columns, w1_k, w1_n)
        w3_at = _at(W3 + e * w3_e, terms, columns, w3_k, w3_n)
        in_rows, in_columns = (rows < end)[:, None], (columns < N)[None, :]
        gate = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for k in range(0, tl.where(expert < E, K, 0), BLOCK_K):
            if EVEN_K:
                x = tl.load(x_at, in_rows, other=0.0)
                w1 = tl.load(w1_at, in_columns, other=0.0)
                if GATED:
                    w3 = tl.load(w3_at, in_columns, other=0.0)
            else:
                x = tl.load(x_at, in_rows & (terms < K - k)[None, :], other=0.0)
                w1 = tl.load(w1_at, in_columns & (terms < K - k)[:, None], other=0.0)
                if GATED:
                    w3 = tl.load(w3_at, in_columns & (terms < K - k)[:, None], other=0.0)
            gate = tl.dot(x, w1, gate, input_precision="ieee")
            if GATED:
                up = tl.dot(x, w3, up, input_precision="ieee")
            x_at += BLOCK_K * x_k
            w1_at += BLOCK_K * w1_k
            w3_at += BLOCK_K * w3_k
        if BIASED:
            gate += tiles.bias(B1, expert, columns, E, N)[None, :]
            if GATED:
                up += tiles.bias(B3, expert, columns, E, N)[None, :]
        score = gate  # any tensor: without TOP_K nobody reads it
        if TOP_K:
            score = tl.load(SCORES + _choices(ORDER, rows, rows < end)).to(tl.float32)
        _store_gate_and_up(
            gate, up, score, GATE, UP, HIDDEN, rows, rows < end, column * BLOCK_N, N,
            HIDDEN_TOO, TOP_K > 0, GATED, ACTIVATION,
        )  # fmt: skip


@triton.jit
def _through_activation(
    grad, score, GATE, UP, HIDDEN, DGATE, DUP, rows, in_rows, column, N,
    SCORED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Turn the gradient of a tile of ``score * hidden`` into those of gate and up.

    Store both, and the tile itself. Return the sum over the columns of ``grad * hidden``.
    """
    if grad.shape[1] > PIECE:
        left, right = tiles.halves(grad)
        half: tl.constexpr = grad.shape[1] // 2
        return _through_activation(
            left, score, GATE, UP, HIDDEN, DGATE, DUP, rows, in_rows, column, N,
            SCORED, GATED, ACTIVATION,
        ) + _through_activation(
            right, score, GATE, UP, HIDDEN, DGATE, DUP, rows, in_rows, column + half, N,
            SCORED, GATED, ACTIVATION,
        )  # fmt: skip
    else:  # noqa: RET505 - as above
        columns = column + tl.arange(0, grad.shape[1])
        at = rows.to(tl.int64)[:, None] * N + columns[None, :]
        inside = in_rows[:, None] & (columns < N)[None, :]
        gate = tl.load(GATE + at, inside, other=0.0).to(tl.float32)
        activated = tiles.activated(gate, ACTIVATION)
        hidden = activated
        if GATED:
            up = tl.load(UP + at, inside, other=0.0).to(tl.float32)
            factor = tiles.factor(up, ACTIVATION)
            hidden = activated * factor
        grad_score = tl.sum(grad * hidden, 1)
        if SCORED:
            hidden *= score[:, None]
            grad *= score[:, None]
        grad_gate = grad * tiles.slope(gate, ACTIVATION)
        if GATED:
            grad_gate *= factor
            grad_up = tiles.through_factor(grad * activated, up, ACTIVATION)
            tl.store(DUP + at, grad_up.to(DUP.dtype.element_ty), inside)
        tl.store(HIDDEN + at, hidden.to(HIDDEN.dtype.element_ty), inside)
        tl.store(DGATE + at, grad_gate.to(DGATE.dtype.element_ty), inside)
        return grad_score


@triton.jit
def _store_sums(OUT, sums, lines, inside, first, width, PLACES: tl.constexpr):
    """Write a sum of every line to place ``first`` of OUT [lines, width], and zeros after it."""
    places = tl.arange(0, PLACES)
    values = tl.where(places[None, :] == 0, sums[:, None], 0.0)
    here = inside[:, None] & (first + places < width)[None, :]
    tl.store(_at(OUT, lines, first + places, width, 1), values, here)


@tuned
@triton.jit(do_not_specialize=["R", "R_BUCKET"])
def hidden_gradients(
    DY, W2, GATE, UP, offs, ORDER, SCORES, HIDDEN, DGATE, DUP, DSCORES, E, R, R_BUCKET, K, N,
    dy_r, dy_k, w2_e, w2_k, w2_n,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, TOP_K: tl.constexpr, PART: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Differentiate what is elementwise: ``grad_y @ w2`` becomes gradients of gate and up. [R, N].

    HIDDEN is the hidden rows again, for w2's gradient: two loaded tiles and no product, which is
    cheaper than saving them between forward and backward. UP and DUP are not used unless GATED.

    With TOP_K, DY is the gradient of the layer's output, [T, D], and HIDDEN is multiplied by the
    scores. Their gradient is a sum over N, of which a program has BLOCK_N terms: DSCORES has a
    place for every PART of them, [T * K, N / PART]. A program writes its sum to the first place of
    its columns and zeros to the others, so that all are written whatever the tiles' sizes.
    """
    slot, column = _place(tl.program_id(0), R // BLOCK_R + E + 1, tl.cdiv(N, BLOCK_N), GROUP)
    expert, row, end = _rows_of(slot, offs, E, R, BLOCK_E, BLOCK_R)
    if row < end:
        rows = row + tl.arange(0, BLOCK_R)
        in_rows = rows < end
        columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
        grad = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        grad = _add_product(
            grad, DY, W2 + expert.to(tl.int64) * w2_e, _tokens(ORDER, rows, in_rows, TOP_K),
            in_rows, columns, tl.where(expert < E, K, 0), N, dy_r, dy_k, w2_k, w2_n,
            BLOCK_K, EVEN_K,
        )  # fmt: skip
        score = grad  # any tensor: without TOP_K nobody reads it
        if TOP_K:
            choices = _choices(ORDER, rows, in_rows)
            score = tl.load(SCORES + choices).to(tl.float32)
        # gate and up of the tail hold anything, and would reach the scores' gradient.
        readable = in_rows & (expert < E)
        grad_score = _through_activation(
            grad, score, GATE, UP, HIDDEN, DGATE, DUP, rows, readable, column * BLOCK_N, N,
            TOP_K > 0, GATED, ACTIVATION,
        )  # fmt: skip
        if TOP_K:
            places: tl.constexpr = BLOCK_N // PART
            first, width = column * places, tl.cdiv(N, PART)
            _store_sums(DSCORES, grad_score, choices, in_rows, first, width, places)


@tuned
@triton.jit(do_not_specialize=["R", "R_BUCKET"])
def weight_gradient(
    LEFT, RIGHT, offs, ORDER, TRAINED, GRAD, E, R, R_BUCKET, K, N,
    l_r, l_k, r_r, r_n, g_e, g_k, g_n,
    SOME: tl.constexpr, TOP_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute ``GRAD[e] = LEFT[rows of e].T @ RIGHT[rows of e]``, [E, K, N]; zeros without rows.

    With TOP_K, RIGHT is [T, N]: its rows are read where the tokens are. With SOME, an expert whose
    entry of TRAINED is 0 gets zeros.

    Here rows are the terms of the sum: a tile covers BLOCK_R of K and BLOCK_K of them.
    """
    per_expert = tl.cdiv(K, BLOCK_R) * tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // per_expert
    block, column = _place(
        tl.program_id(0) % per_expert, tl.cdiv(K, BLOCK_R), tl.cdiv(N, BLOCK_N), GROUP
    )
    # An expert without rows has start == end: no iteration, and the zeros of acc are stored.
    start = tl.load(offs + expert - 1, expert > 0, other=0).to(tl.int32)
    end = tl.load(offs + expert).to(tl.int32)
    if SOME:
        end = tl.where(tl.load(TRAINED + expert) > 0, end, start)
    ks = block * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = start + tl.arange(0, BLOCK_K)
    left_at = _at(LEFT, ks, rows, l_k, l_r)
    in_ks, in_columns = (ks < K)[:, None], (columns < N)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    # Looked up a step ahead: Triton then loads rows as many steps ahead as if they were in place.
    tokens = _tokens(ORDER, rows, rows < end, TOP_K)
    for _ in range(start, end, BLOCK_K):
        # The rows after `end` are the next expert's: mask them, or they would be added.
        in_rows = rows < end
        right_at = _at(RIGHT, tokens, columns, r_r, r_n)
        rows += BLOCK_K
        tokens = _tokens(ORDER, rows, rows < end, TOP_K)
        left = tl.load(left_at, in_ks & in_rows[None, :], other=0.0)
        right = tl.load(right_at, in_rows[:, None] & in_columns, other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        left_at += BLOCK_K * l_r
    at = _at(GRAD + expert.to(tl.int64) * g_e, ks, columns, g_k, g_n)
    tl.store(at, acc.to(GRAD.dtype.element_ty), in_ks & in_columns)
