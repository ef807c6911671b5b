"""Dense float64 NumPy forms of everything, written from the papers and for clarity alone."""

from fractions import Fraction
from itertools import pairwise

import numpy as np


def fisher(gradients, damping):
    """WoodFisher eq. 5: F = λI + (1/m) Σ g gᵀ."""
    g = np.asarray(gradients, np.float64)
    return damping * np.eye(g.shape[1]) + sum(np.outer(row, row) for row in g) / len(g)


def woodfisher_inverse(gradients, damping):
    """WoodFisher eq. 6: the recursion over examples."""
    g = np.asarray(gradients, np.float64)
    inverse = np.eye(g.shape[1]) / damping
    for row in g:
        u = inverse @ row
        inverse = inverse - np.outer(u, u) / (len(g) + row @ u)
    return inverse


def blockwise(matrix, blocks):
    """Zero outside the diagonal blocks given as lists of indices."""
    out = np.zeros_like(matrix)
    for block in blocks:
        out[np.ix_(block, block)] = matrix[np.ix_(block, block)]
    return out


def quadratic(hessian, step, gradient=None):
    """ḡᵀδ + ½ δᵀHδ."""
    first_order = 0.0 if gradient is None else gradient @ step
    return first_order + 0.5 * step @ hessian @ step


def constrained_minimiser(hessian, weights, pruned, gradient=None):
    """Lagrangian system of: minimise ḡᵀδ + ½ δᵀHδ subject to δ_Q = −w_Q."""
    d, q = len(weights), np.flatnonzero(pruned)
    e = np.eye(d)[:, q]
    system = np.block([[hessian, e], [e.T, np.zeros((len(q), len(q)))]])
    right = np.concatenate([np.zeros(d) if gradient is None else -gradient, -weights[q]])
    return np.linalg.solve(system, right)[:d]


def removal_costs(hessian, weights, gradient=None):
    """Loss change of removing each weight alone with the others re-optimised."""
    costs = []
    for q in range(len(weights)):
        pruned = np.arange(len(weights)) == q
        step = constrained_minimiser(hessian, weights, pruned, gradient)
        costs.append(quadratic(hessian, step, gradient))
    return np.array(costs)


def sum_of_single_steps(hessian, weights, pruned, gradient=None):
    """WoodFisher section 4: single OBS steps added up; a Newton step is taken once."""
    inverse = np.linalg.inv(hessian)
    newton = np.zeros(len(weights)) if gradient is None else inverse @ gradient
    step = -newton
    for q in np.flatnonzero(pruned):
        step = step - (weights[q] - newton[q]) / inverse[q, q] * inverse[:, q]
    return step


def lowest(scores, count):
    """True on the `count` lowest scores, ties by index."""
    pruned = np.zeros(len(scores), bool)
    pruned[np.argsort(scores, kind="stable")[:count]] = True
    return pruned


def rounded(sparsity, size):
    """round(s·n), halves to even, in exact arithmetic."""
    return round(Fraction(sparsity) * size)


def softmax_fisher(jacobian, probabilities):
    """Σ_c p_c ∇log p_c ∇log p_cᵀ of one example, from the Jacobian of its logits [C, d]."""
    centred = jacobian - probabilities @ jacobian
    return sum(p * np.outer(row, row) for p, row in zip(probabilities, centred, strict=True))


def column_sweep(kernel, hessian, block_size, choose):
    """SparseGPT: greedy OBS in the order of the inputs, each step with an explicit inverse of those still free.

    `choose(first, scores [in, out]) -> pruned [in, out] or None`: the mask from row `first` on, where it is due.
    """
    w, pruned = np.array(kernel, np.float64), np.zeros(kernel.shape, bool)
    for i in range(len(w)):
        if i % block_size == 0:
            scores = np.stack([w[j] ** 2 / np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(len(w))])
            pruned[i : i + block_size] = choose(i, scores[i : i + block_size])
        inverse = np.linalg.inv(hessian[i:, i:])
        for o in np.flatnonzero(pruned[i]):
            w[i:, o] -= w[i, o] / inverse[0, 0] * inverse[:, 0]
    return np.where(pruned, 0, w), ~pruned


def init_scores(weights, gradients, hessian):
    """Scores at initialization (arXiv 2502.11450), from per-example gradients [n, d] and the dense Hessian."""
    mean, fisher_diagonal, diagonal = gradients.mean(axis=0), (gradients**2).mean(axis=0), np.diag(hessian)
    removal = -weights  # δ of a weight that is removed
    return {
        "grad-norm": np.abs(mean),
        "snip": np.abs(removal * mean),
        "grasp": -(removal * (hessian @ mean)),  # −(what removal adds to ½‖ḡ‖², to first order)
        "fisher-diagonal": fisher_diagonal,
        "fisher-pruner": 0.5 * removal**2 * fisher_diagonal,
        "fisher-taylor": np.abs(removal * mean + 0.5 * removal**2 * fisher_diagonal),
        "hessian-diagonal": diagonal,
        "hessian-pruner": 0.5 * removal**2 * diagonal,
        "hessian-taylor": np.abs(removal * mean + 0.5 * removal**2 * diagonal),
    }


def path_shares(kernels):
    """SynFlow of a ReLU network without biases: the share of every weight in the sum of |w| products over all paths."""
    sizes = [kernel.shape[0] for kernel in kernels] + [kernels[-1].shape[1]]
    shares = [np.zeros(kernel.shape) for kernel in kernels]
    for path in np.ndindex(*sizes):
        edges = list(pairwise(path))
        product = np.prod([abs(kernel[edge]) for kernel, edge in zip(kernels, edges, strict=True)])
        for share, edge in zip(shares, edges, strict=True):
            share[edge] += product
    return [share / share.sum() for share in shares]


def on_a_path(masks):
    """Which weights of a dense network lie on a path from an input to an output."""
    sizes = [mask.shape[0] for mask in masks] + [masks[-1].shape[1]]
    found = [np.zeros(mask.shape, bool) for mask in masks]
    for path in np.ndindex(*sizes):
        edges = list(pairwise(path))
        if all(mask[edge] for mask, edge in zip(masks, edges, strict=True)):
            for one, edge in zip(found, edges, strict=True):
                one[edge] = True
    return found


def probe_variance(hessian, block):
    """Variance of `Σ_{q∈block} z_q (Hz)_q` over random signs `z`: pairs inside the block meet twice.

    Avron & Toledo 2011, lemma 9, for all coordinates: 2(‖H‖² − Σ H_qq²); Bekas et al. 2007 for a single one.
    """
    squares = np.asarray(hessian, np.float64) ** 2
    np.fill_diagonal(squares, 0)
    inside = np.isin(np.arange(len(squares)), block)
    return 2 * squares[np.ix_(inside, inside)].sum() + squares[np.ix_(inside, ~inside)].sum()


def channel_removal(hessian, damping, weights, members, readers, gradient=None):
    """Removing a channel: its readers go to zero, its other weights stay where they are, all else is free.

    `hessian` without damping, `damping` of each coordinate that moves freely; `weights` of all coordinates, and which
    of them are of the channel and read it. The step, and what it costs, damping of the free weights included.
    """
    leaving = np.where(readers, weights, 0)
    held = hessian + np.diag(np.broadcast_to(damping, len(weights)))
    step = constrained_minimiser(held, leaving, members, gradient)
    return step, quadratic(hessian + np.diag(np.where(members, 0, damping)), step, gradient)


def hessian_aware_score(weights, diagonal):
    """HAP: ½ tr(H_cc)/p ‖w_c‖² of one channel."""
    return 0.5 * np.sum(diagonal) / len(weights) * np.sum(weights**2)


def patches(images, size, stride):
    """What a convolution without padding reads at each place, `[places, size · size · channels]`."""
    n, h, w, _ = images.shape
    rows = [
        images[i, y : y + size, x : x + size].reshape(-1)
        for i in range(n)
        for y in range(0, h - size + 1, stride)
        for x in range(0, w - size + 1, stride)
    ]
    return np.array(rows)


def reconstruction(inputs, kernel, lost, ridge):
    """Channel Pruning: `min_V ‖XW − X_K V‖² + ridge ‖V − W_K‖²`, as one least-squares problem."""
    free = np.flatnonzero(~lost)
    design = np.concatenate([inputs[:, free], np.sqrt(ridge) * np.eye(len(free))])
    target = np.concatenate([inputs @ kernel, np.sqrt(ridge) * kernel[free]])
    out = np.zeros_like(kernel)
    out[free] = np.linalg.lstsq(design, target, rcond=None)[0]
    return out


def pack_nm(rows, kept, n, m):
    """Mishra et al. 2021, section 3, written out group by group: values kept, and where, low bits first."""
    width = (m - 1).bit_length()
    values, positions = [], []
    for row, groups in zip(rows.reshape(-1, rows.shape[-1]), kept.reshape(-1, kept.shape[-2], m), strict=True):
        bits = ""
        for number, group in enumerate(groups):
            survivors = list(np.flatnonzero(group))
            filling = [place for place in range(m) if place not in survivors]
            for place in sorted((survivors + filling)[:n]):
                values.append(row[number * m + place] if group[place] else row.dtype.type(0))
                bits += f"{place:0{width}b}"[::-1]
        bits += "0" * (-len(bits) % 8)
        positions.append([int(bits[start : start + 8][::-1], 2) for start in range(0, len(bits), 8)])
    lead = rows.shape[:-1]
    return np.array(values, rows.dtype).reshape(*lead, -1), np.array(positions, np.uint8).reshape(*lead, -1)


def joint_order(hessian):
    """Greedy Combinatorial Brain Surgeon over gates: place of each, when the loss of all that are gone grows least."""
    gone, places = [], np.zeros(len(hessian))
    for step in range(len(hessian)):
        rest = [c for c in range(len(hessian)) if c not in gone]
        best = min(rest, key=lambda c: quadratic(hessian, -np.isin(np.arange(len(hessian)), [*gone, c]).astype(float)))
        gone.append(best)
        places[best] = step
    return places


def convolution(inputs, kernel, strides, padding, dilation):
    """Response of a kernel `[k, k, i, o]` on `[n, h, w, i]`, and what it reads at its centre (HAP, section 3.3)."""
    inputs, kernel = np.asarray(inputs, np.float64), np.asarray(kernel, np.float64)
    padded = np.pad(inputs, ((0, 0), *padding, (0, 0)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[:2], strict=True)]
    rows = range(0, padded.shape[1] - reach[0] + 1, strides[0])
    columns = range(0, padded.shape[2] - reach[1] + 1, strides[1])
    response = np.zeros((len(inputs), len(rows), len(columns), kernel.shape[3]))
    centre = np.zeros((*response.shape[:3], inputs.shape[3]))
    middle = [(k - 1) // 2 * d for d, k in zip(dilation, kernel.shape[:2], strict=True)]
    for a, row in enumerate(rows):
        for b, column in enumerate(columns):
            centre[:, a, b] = padded[:, row + middle[0], column + middle[1]]
            for i in range(kernel.shape[0]):
                for j in range(kernel.shape[1]):
                    here = padded[:, row + i * dilation[0], column + j * dilation[1]]
                    response[:, a, b] += here @ kernel[i, j]
    return response, centre


def implant(centre, response, ridge):
    """`argmin ‖XW − Y‖² + ridge · mean(diag XᵀX) ‖W‖²` by least squares of the stacked problem."""
    read, written = centre.reshape(-1, centre.shape[-1]), response.reshape(-1, response.shape[-1])
    weight = np.sqrt(ridge * (read**2).sum() / read.shape[1])
    stacked = np.vstack([read, weight * np.eye(read.shape[1])])
    zeros = np.zeros((read.shape[1], written.shape[1]))
    return np.linalg.lstsq(stacked, np.vstack([written, zeros]), rcond=None)[0]


def best_rank(response, rank):
    """The nearest matrix of a rank to `[n, o]` (Eckart and Young, 1936)."""
    left, values, right = np.linalg.svd(response.reshape(-1, response.shape[-1]), full_matrices=False)
    return (left[:, :rank] * values[:rank] @ right[:rank]).reshape(response.shape)
