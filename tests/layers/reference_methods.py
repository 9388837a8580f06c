"""The rival methods token by token, in float64, each written from its own equations.

A layer's parameters are read by name; which experts a token uses, with which weights, and every loss is computed here.
"""

import torch
from reference import expert_output, swiglu


def softmax(logits):
    return torch.exp(logits) / torch.exp(logits).sum()


def best(scores, k):
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def weighted_sum(layer, x, gates):
    return sum((g * expert_output(layer, i, x) for i, g in gates.items()), torch.zeros_like(x))


def switch(layer, x_TD):
    """y = p_i(x) E_i(x) with i = argmax p; loss N sum f_i P_i."""
    outputs, probs, counts = [], [], torch.zeros(layer.config.experts.total, dtype=x_TD.dtype)
    for x in x_TD:
        p = softmax(layer.router.weight @ x)
        (i,) = best(p, 1)
        outputs.append(p[i] * expert_output(layer, i, x))
        probs.append(p)
        counts[i] += 1
    return torch.stack(outputs), len(counts) * (counts / len(x_TD) * sum(probs) / len(x_TD)).sum()


def deepseek_moe(layer, x_TD):
    """y = sum over shared FFN_i(x) + sum over top-k s_i FFN_i(x); the shared experts are slices of one wide FFN."""
    config, shared, outputs = layer.config, layer.shared, []
    gate, up = shared.w_in.weight.chunk(2)
    width = config.hidden
    for x in x_TD:
        s = softmax(layer.router.weight @ x)
        y = weighted_sum(layer, x, {i: s[i] for i in best(s, config.top_k)})
        for j in range(config.experts.shared):
            rows = slice(j * width, (j + 1) * width)
            y = y + swiglu(x, torch.cat([gate[rows], up[rows]]), shared.w_out.weight[:, rows])
        outputs.append(y)
    return torch.stack(outputs)


def _true_experts_only(layer, x, chosen, scores):
    true = [i for i in chosen if i < layer.config.experts.ffn]
    total = sum((scores[i] for i in true), torch.zeros((), dtype=x.dtype))
    return weighted_sum(layer, x, {i: scores[i] / total for i in true})


def adamoe(layer, x_TD):
    """Nulls give nothing and no weight; loss (n + m) sum f~_i P_i, where f~ of every null is the nulls' mean."""
    n, m, k = layer.config.experts.ffn, layer.config.experts.zero, layer.config.top_k
    outputs, probs, chosen = [], [], []
    for x in x_TD:
        p = softmax(layer.router.weight @ x)
        chosen.append(best(p, k))
        outputs.append(_true_experts_only(layer, x, chosen[-1], p))
        probs.append(p)
    f = [sum(i in c for c in chosen) / len(x_TD) for i in range(n + m)]
    nulls = sum(f[n:]) / m
    mean = sum(probs) / len(x_TD)
    return torch.stack(outputs), (n + m) * sum((f[i] if i < n else nulls) * mean[i] for i in range(n + m))


def shared_null(layer, x_TD):
    """Logits of the n real experts and M copies of one null logit; loss over N + M and mean (log sum exp)^2."""
    n, m, k = layer.config.experts.ffn, layer.config.experts.zero, layer.config.top_k
    outputs, mean, slots, squares = [], 0, torch.zeros(n + 1, dtype=x_TD.dtype), 0
    for x in x_TD:
        real, null = (layer.router.weight @ x).split([n, 1])
        real, null = real, null[0]
        normalizer = torch.exp(real).sum() + m * torch.exp(null)
        above = [i for i in best(real, k) if real[i] > null]  # a null slot takes every place a real expert does not win
        outputs.append(_true_experts_only(layer, x, above, torch.exp(real) / normalizer))
        mean = mean + torch.cat([torch.exp(real), torch.exp(null)[None]]) / normalizer / len(x_TD)
        for i in above:
            slots[i] += 1
        slots[n] += k - len(above)
        squares = squares + torch.log(normalizer) ** 2 / len(x_TD)
    return torch.stack(outputs), (n + m) * (slots / len(x_TD) * mean).sum(), squares


def longcat(layer, x_TD, bias, k_e):
    """Chosen by TopK(R + b), weighted by R; group loss sum_{j <= D + 1} f_j P_j with D = 1."""
    config, outputs = layer.config, []
    n, k, tokens = config.experts.ffn, config.top_k, len(x_TD)
    probs_ffn, probs_copy, slots_ffn, slots_copy = 0, 0, 0, 0
    for x in x_TD:
        r = softmax(layer.router.weight @ x)
        chosen = best(r + bias, k)
        outputs.append(weighted_sum(layer, x, {i: r[i] for i in chosen}))
        slots_ffn += sum(i < n for i in chosen)
        slots_copy += sum(i >= n for i in chosen)
        probs_ffn, probs_copy = probs_ffn + r[:n].sum() / tokens, probs_copy + r[n:].sum() / tokens
    loss = slots_ffn / (k_e * tokens) * probs_ffn + slots_copy / ((k - k_e) * tokens) * probs_copy
    return torch.stack(outputs), loss


def remoe(layer, x_TD):
    """y = sum ReLU(x W)_i E_i(x); L1 of the gates weighted by each expert's load, N sum f_i mean ReLU_i."""
    outputs, gates = [], []
    for x in x_TD:
        g = torch.clamp(layer.router.weight @ x, min=0)
        gates.append(g)
        outputs.append(weighted_sum(layer, x, {i: v for i, v in enumerate(g) if v > 0}))
    loss = 0
    for i in range(len(gates[0])):
        f = sum(float(g[i] > 0) for g in gates) / len(x_TD)
        loss = loss + len(gates[0]) * f * sum(g[i] for g in gates) / len(x_TD)
    return torch.stack(outputs), loss, [[i for i, v in enumerate(g) if v > 0] for g in gates]


def top_p(layer, x_TD):
    """The smallest set that reaches p, weighted by the probabilities; entropy -sum P log P."""
    outputs, sets, entropy = [], [], 0
    for x in x_TD:
        p = softmax(layer.router.weight @ x)
        chosen, reached = [], 0.0
        for i in best(p, len(p)):
            if reached >= layer.config.top_p:
                break
            chosen.append(i)
            reached += p[i].item()
        sets.append(sorted(chosen))
        outputs.append(weighted_sum(layer, x, {i: p[i] for i in chosen}))
        entropy = entropy - (p * torch.log(p)).sum() / len(x_TD)
    return torch.stack(outputs), entropy, sets


def recurrent_logits(projection, weight, gru, x, previous):
    """x' = Proj x; h = GRU(x', h_before); logits = W h. Gates in the order reset, update, new."""
    x = projection @ x
    size = len(previous)
    inputs, states = gru.weight_ih @ x, gru.weight_hh @ previous
    reset, update = (1 / (1 + torch.exp(-(inputs[s] + states[s]))) for s in (slice(size), slice(size, 2 * size)))
    new = torch.tanh(inputs[2 * size :] + reset * states[2 * size :])
    h = (1 - update) * new + update * previous
    return weight @ h, h
