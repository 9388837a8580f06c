from dataclasses import replace

import pytest

from moepp.reports.communication import AlphaBeta, Cluster, MeasuredExchange, Work, error, fit, predict

TRUE = AlphaBeta(alpha=20e-6, beta=1 / 5e9)
SIZES = [(messages, size) for messages in (1, 3, 7) for size in (1e3, 1e5, 1e7)]
CLUSTER = Cluster("toy", 8, inside=AlphaBeta(1e-6, 1e-11), between=AlphaBeta(5e-6, 1e-10), flops=1e14)
WORK = Work(
    batch_tokens=2**20, micro_batch_tokens=2**12, layers=10, width=1000, experts=16, top_k=2, ffn_share=1.0,
    flops_per_token=1e9, dense_parameters=10**8, expert_parameters=10**9,
)  # fmt: skip


def test_exact_times_give_back_alpha_and_beta():
    found = fit([MeasuredExchange(m, s, TRUE.seconds(m, s)) for m, s in SIZES])
    assert found.alpha == pytest.approx(TRUE.alpha) and found.bandwidth == pytest.approx(5e9)
    assert error(found, [MeasuredExchange(m, s, TRUE.seconds(m, s)) for m, s in SIZES]).largest < 1e-9


def test_neither_cost_is_negative():
    found = fit([MeasuredExchange(1, 1e3, 1e-3), MeasuredExchange(1, 1e6, 1e-4)])  # the longer was faster
    assert found.alpha > 0 and found.beta == 0 and found.bandwidth == float("inf")


def test_one_exchange_is_not_enough():
    with pytest.raises(ValueError, match="do not determine alpha and beta"):
        fit([MeasuredExchange(1, 1e3, 1e-3)])


def test_errors_are_relative_and_keep_their_sign():
    found = error(
        TRUE, [MeasuredExchange(m, s, TRUE.seconds(m, s) * by) for (m, s), by in zip(SIZES, [2.0] * 9, strict=True)]
    )
    assert (found.median, found.largest, found.bias, found.count) == (0.5, 0.5, -0.5, 9)


def test_inside_a_node_a_step_is_computed_by_hand():
    step = predict(WORK, CLUSTER, 8)
    assert step.expert_group == 8
    to_each = 2**12 * 2 / 8 * 1000 * 2  # rows for one device, in bytes
    exchanges = 32 * 10 * 4  # micro-batches, layers
    assert step.exchanged_bytes == exchanges * 7 * to_each
    assert step.exchange == pytest.approx(exchanges * (7 * 1e-6 + 7 * to_each * 1e-11))
    assert step.compute == pytest.approx(3 * 1e9 * 2**17 / 1e14)
    dense, experts = 14e-6 + 14 / 8 * 4e8 * 1e-11, 0.0  # each device has its own experts
    assert step.gradients == pytest.approx(max(0, dense + experts - step.compute / 32 * 2 / 3))
    assert step.seconds == step.compute + step.exchange + step.gradients
    assert predict(WORK, CLUSTER, 8, overlap=True).seconds == max(step.compute, step.exchange) + step.gradients


def test_between_nodes_the_slower_link_decides():
    step = predict(WORK, CLUSTER, 16)
    to_each = 2**12 * 2 / 16 * 1000 * 2
    assert step.exchange == pytest.approx(16 * 10 * 4 * (8 * 5e-6 + 8 * to_each * 1e-10))


def test_more_devices_than_experts_copy_them():
    assert predict(WORK, CLUSTER, 64).expert_group == 16
    assert predict(WORK, CLUSTER, 64).exchange == pytest.approx(predict(WORK, CLUSTER, 16).exchange / 4)


def test_rows_that_stay_away_from_ffn_experts_are_not_sent():
    half = predict(replace(WORK, ffn_share=0.5), CLUSTER, 16)
    assert half.exchanged_bytes == predict(WORK, CLUSTER, 16).exchanged_bytes / 2


@pytest.mark.parametrize(
    ("change", "devices"), [({}, 24), ({"experts": 12}, 8), ({"micro_batch_tokens": 3000}, 8), ({}, 512)]
)
def test_what_cannot_be_divided_is_refused(change, devices):
    with pytest.raises(ValueError, match=r"cannot be divided|no multiple"):
        predict(replace(WORK, **change), CLUSTER, devices)
