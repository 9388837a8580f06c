import pytest
from moepp.experiments.table6 import EXPERIMENT as TABLE6
from scipy import stats
from synthetic_sweep import compared, write_run, write_sweep

from moepp.errors import UsageError
from moepp.records import write_json
from moepp.reports.tables import signed
from moepp.reports.verdict import held_equal, noise_floor, verdict

FULL = "zero+copy+constant"
CLEAR = {  # with the residual clearly below, without it clearly above vanilla
    "vanilla": {0: 3.200, 1: 3.260, 2: 3.170},
    "no_residual": {0: 3.301, 1: 3.360, 2: 3.269},
    FULL: {0: 3.099, 1: 3.160, 2: 3.071},
}
NOISY = {
    "vanilla": {0: 3.20, 1: 3.26, 2: 3.17},
    "no_residual": {0: 3.22, 1: 3.21, 2: 3.19},
    FULL: {0: 3.17, 1: 3.29, 2: 3.16},
}


def comparison(tmp_path, losses, times=None):
    return compared(TABLE6, write_sweep(tmp_path, losses, times))


def test_differences_are_paired_and_corrected_over_the_arms(tmp_path):
    found = comparison(tmp_path, NOISY).differences
    assert found[FULL].by_seed == pytest.approx({0: -0.03, 1: 0.03, 2: -0.01})
    assert found[FULL].estimate.p_value == pytest.approx(stats.ttest_1samp([-0.03, 0.03, -0.01], 0).pvalue)
    assert found[FULL].p_holm == 1.0  # of two: twice its own, and never above 1
    assert not any(difference.significant for difference in found.values())


def test_the_clearest_of_two_arms_pays_for_two_tests(tmp_path):
    losses = {**NOISY, FULL: CLEAR[FULL]}
    found = comparison(tmp_path, losses).differences
    assert found[FULL].p_holm == pytest.approx(2 * found[FULL].estimate.p_value)
    assert found["no_residual"].p_holm == pytest.approx(found["no_residual"].estimate.p_value)


def test_a_difference_that_only_its_own_interval_excludes_from_0_is_not_beyond_noise(tmp_path):
    differences = {0: -0.0387, 1: -0.0560, 2: -0.0733}  # alone p = 0.03, twice that after Holm
    losses = {**NOISY, FULL: {seed: NOISY["vanilla"][seed] + d for seed, d in differences.items()}}
    found = comparison(tmp_path, losses).differences[FULL]
    assert found.estimate.excludes_zero and 0.05 < found.p_holm < 0.07
    assert not found.significant and signed(found) == "-0.0560 ± 0.0430†"


def test_a_contrast_averages_its_arms_within_each_seed(tmp_path):
    effect = comparison(tmp_path, CLEAR).contrasts["the gating residual"]
    assert effect.by_seed == pytest.approx({0: -0.202, 1: -0.200, 2: -0.198})
    assert effect.significant and effect.estimate.mean == pytest.approx(-0.2)


def test_only_seeds_finished_on_both_sides_make_pairs(tmp_path):
    losses = {**CLEAR, FULL: {1: 3.160, 2: 3.071, 7: 2.0}}
    found = comparison(tmp_path, losses).differences[FULL]
    assert list(found.by_seed) == [1, 2] and found.estimate.n == 2


def test_the_noise_floor_pools_the_paired_differences(tmp_path):
    noise = comparison(tmp_path, NOISY).noise
    deviations = [stats.tstd([a - b for a, b in zip(NOISY[arm].values(), NOISY["vanilla"].values(), strict=True)])
                  for arm in ("no_residual", FULL)]  # fmt: skip
    assert noise.baseline_std == pytest.approx(stats.tstd(list(NOISY["vanilla"].values())))
    assert noise.difference_std == pytest.approx((sum(d**2 for d in deviations) / 2) ** 0.5)
    assert noise.detectable < noise.detectable_corrected


def test_verdict_on_clear_data(tmp_path):
    said = verdict(
        comparison(tmp_path, CLEAR, {"vanilla": (12.0, 1.0), FULL: (10.0, 0.75), "no_residual": (10.5, 0.75)})
    )
    assert said[0].startswith(f"Lower validation loss than vanilla, beyond noise: {FULL} (-0.1000 ±")
    assert "Higher validation loss than vanilla, beyond noise: no_residual (+0.1000 ±" in said[0]
    assert "Not distinguishable" not in said[0]
    assert said[1].startswith("Effect of the gating residual") and "lower validation loss, beyond noise" in said[1]
    assert (
        "3 pairs" in said[2]
        and "2 go the paper's way, 1 against it (vanilla has the lower loss, the paper has no_residual)" in said[2]
    )
    assert f"{FULL} 1.20x (ideal for its FFN compute 1.33x, paper 1.22x). Fastest: {FULL}." in said[3]


def test_verdict_on_noise(tmp_path):
    said = " ".join(verdict(comparison(tmp_path, NOISY)))
    assert f"Not distinguishable from vanilla at this scale: no_residual, {FULL}." in said
    assert "neither confirmed nor refuted" in said
    assert "not distinguishable from none" in said
    assert "Lower validation loss" not in said and "Higher validation loss" not in said


def test_verdict_when_the_papers_order_holds(tmp_path):
    losses = {**CLEAR, "no_residual": {0: 3.151, 1: 3.210, 2: 3.119}}
    assert "All of these go the paper's way." in " ".join(verdict(comparison(tmp_path, losses)))


def test_one_seed_cannot_be_told_from_noise(tmp_path):
    found = comparison(tmp_path, {arm: {0: by_seed[0]} for arm, by_seed in CLEAR.items()})
    assert (
        verdict(found)[0]
        == "No arm shares two seeds with vanilla: no difference can be told from noise. Run three or more."
    )
    assert noise_floor(found) == [
        "Fewer than two seeds are shared with the baseline: the noise of a difference is unknown."
    ]


def test_a_missing_baseline_is_said(tmp_path):
    said = verdict(comparison(tmp_path, {FULL: CLEAR[FULL]}))
    assert said[0] == "No seed is finished in both vanilla and another arm: nothing can be compared yet."


def test_missing_runs_make_the_verdict_preliminary(tmp_path):
    write_sweep(tmp_path, CLEAR)
    (tmp_path / f"trials/{FULL}-2/done").unlink()
    assert verdict(compared(TABLE6, tmp_path))[0] == "Preliminary, planned runs still missing: 1."


def test_says_what_is_equal_what_is_not_and_when_a_declared_match_is_broken(tmp_path):
    write_sweep(tmp_path, CLEAR)
    write_run(tmp_path / f"trials/{FULL}-0", 3.1, ffn_share=0.5)
    budget = {"total_params": 1_005_000, "active_params": 500_000, "flops_per_token": 8e5, "tokens": 204_800}
    for seed in range(3):
        write_json(tmp_path / f"trials/{FULL}-{seed}/budget.json", budget)
    said = held_equal(compared(TABLE6, tmp_path))
    assert said[0] == "Equal within 1%: total parameters, activated parameters."
    assert f"Not equal: forward FLOPs per token, 800k ({FULL}) to 1M (vanilla), 25.0% more." in said
    assert any(f"runs from 0.667 ({FULL}) to 0.750 (vanilla)" in line for line in said)
    assert said[-1] == "The sweep declares training tokens equal; the records say they are not."


def test_an_experiment_without_its_baseline_or_its_arms_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no finished run of the arms"):
        comparison(tmp_path / "a", {"other": {0: 3.0}})
    write_sweep(tmp_path / "b", CLEAR)
    sweep = {"name": "s", "question": "?", "scale": "laptop", "baseline": "dense", "match": "tokens"}
    write_json(tmp_path / "b/sweep.json", {**sweep, "trials": [{"arm": FULL, "seed": 0, "path": f"trials/{FULL}-0"}]})
    with pytest.raises(UsageError, match="baseline 'dense', which is none of the arms vanilla, no_residual"):
        compared(TABLE6, tmp_path / "b")
