from dataclasses import replace

import numpy as np
import pytest
from moepp.experiments.table6 import EXPERIMENT as TABLE6
from omegaconf import OmegaConf
from scipy import stats
from synthetic_sweep import compared, write_run, write_sweep

from moepp.errors import UsageError
from moepp.records import write_json, write_text
from moepp.reports.arms import of_sweep
from moepp.reports.recipe import RECIPE
from moepp.reports.tables import cost_table, noise_table, quality_table, recipe_table, second_table, signed
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


def test_every_arm_has_a_noise_floor_of_its_own(tmp_path):
    noise = comparison(tmp_path, NOISY).noise
    assert noise["vanilla"].std == pytest.approx(stats.tstd(list(NOISY["vanilla"].values())))
    assert noise["vanilla"].detectable is None
    for arm in ("no_residual", FULL):
        deviation = stats.tstd([a - b for a, b in zip(NOISY[arm].values(), NOISY["vanilla"].values(), strict=True)])
        assert noise[arm].difference_std == pytest.approx(deviation)
        assert noise[arm].detectable == pytest.approx(3.26 * deviation, rel=0.01)  # n = 3
        assert noise[arm].detectable_corrected > noise[arm].detectable


STUCK = {
    "vanilla": dict(enumerate((4.64, 4.65, 4.66, 4.645, 4.655, 4.648))),
    "no_residual": dict(enumerate((4.63, 4.64, 4.645, 4.64, 4.65, 4.641))),
    FULL: dict(enumerate((4.56, 4.57, 4.58, 5.31, 4.575, 4.569))),
}


def test_an_arm_with_a_stuck_seed_is_flagged_and_judged_by_signs(tmp_path):
    found = comparison(tmp_path, STUCK)
    assert list(found.unstable) == [FULL]
    assert "falls into two groups, 5 near 4.571 and 1 near 5.310" in found.unstable[FULL]
    assert "scatters" in found.unstable[FULL]
    difference = found.differences[FULL]
    assert difference.robust.median == pytest.approx(-0.08) and difference.robust.level == pytest.approx(0.96875)
    assert (difference.robust.low, difference.robust.high) == pytest.approx((-0.08, 0.665))
    assert difference.p_alone == pytest.approx(14 / 64)  # one sign of six is another: 2 (1 + 6) / 2^6
    assert signed(difference).endswith("≈") and "†" not in signed(difference)
    assert found.differences["no_residual"].robust is None
    assert any(line.startswith(f"Unstable: {FULL} scatters") for line in verdict(found))
    rows = {row[0]: row for row in noise_table(found).rows}
    assert rows[FULL][-1].startswith("unstable") and rows["vanilla"][-1] == "–"
    assert [row[-3] for row in quality_table(found).rows if row[0] == FULL] == ["-0.0800 [-0.0800, +0.6650] (97%)"]


def test_drops_in_training_are_shown_and_warned_of(tmp_path):
    write_sweep(tmp_path, CLEAR)
    for seed in range(3):
        drops = {"": 0.218, "_early": 0.61, "_late": 0.11, "_layer_1": 0.3, "_layer_2": 0.136}
        shares = {f"train_dropped_share{name}": share for name, share in drops.items()}
        write_run(tmp_path / f"trials/{FULL}-{seed}", 3.1, **shares)
        write_run(tmp_path / f"trials/vanilla-{seed}", 3.2, train_dropped_share=0.02, train_dropped_share_early=0.4)
    found = compared(TABLE6, tmp_path)
    (warning,) = [line for line in verdict(found) if line.startswith("Warning: slots")]
    assert f"{FULL} 21.8%, 61% in the first tenth." in warning and "vanilla" not in warning
    cells = {row[0]: dict(zip(cost_table(found).columns, row, strict=True)) for row in cost_table(found).rows}
    columns = ("dropped in training, %", "first tenth", "last tenth", "by layer")
    assert [cells[FULL][name] for name in columns] == ["21.8", "61.0", "11.0", "30 / 14"]
    assert [cells["vanilla"][name] for name in columns] == ["2.0", "40.0", "–", "–"]


def test_loads_that_are_far_more_uneven_than_in_another_arm_are_shown_and_warned_of(tmp_path):
    write_sweep(tmp_path, CLEAR)
    for seed in range(3):
        write_run(tmp_path / f"trials/{FULL}-{seed}", 3.1, load_max_over_mean=3.01, ffn_per_token=1.2)
        write_run(tmp_path / f"trials/vanilla-{seed}", 3.2, load_max_over_mean=1.07, ffn_per_token=2.0)
        write_run(tmp_path / f"trials/no_residual-{seed}", 3.1, load_max_over_mean=1.5)
    found = compared(TABLE6, tmp_path)
    (warning,) = [line for line in verdict(found) if line.startswith("Warning: the busiest")]
    assert "1.07 times the mean load in vanilla" in warning
    assert f": {FULL} 3.01 (1.69 times the rows of the busiest in vanilla)." in warning
    column = cost_table(found).columns.index("busiest FFN expert, times the mean load")
    assert {row[0]: row[column] for row in cost_table(found).rows}[FULL] == "3.01"
    for seed in range(3):
        write_run(tmp_path / f"trials/{FULL}-{seed}", 3.1, load_max_over_mean=1.6)
    assert not any(line.startswith("Warning: the busiest") for line in verdict(compared(TABLE6, tmp_path)))


def configured(path, losses, **by_arm):
    write_sweep(path, losses)
    common = {"model.capacity_factor": 1.1, "optim.lr": 0.005, "optim.warmup_steps": 30, "model.balance.beta": 0.01}
    common |= {"model.balance.form": "switch", "model.balance.control": None, "model.balance.tau": 0.75}
    for arm, by_seed in losses.items():
        config = OmegaConf.create({"model": {"experts": {"ffn": 8, "zero": 1, "copy": 1, "constant": 2}}})
        for key, value in (common | by_arm.get(arm, {})).items():
            OmegaConf.update(config, key, value)
        for seed in by_seed:
            OmegaConf.save(config, path / f"trials/{arm}-{seed}/config.yaml")
    return path


def test_an_arm_whose_recipe_differs_for_no_reason_is_marked(tmp_path):
    """As in a sweep of methods of which some train without a capacity."""
    differing = {"no_residual": {"model.capacity_factor": None, "optim.beta2": 0.9}}
    found = compared(TABLE6, configured(tmp_path, CLEAR, **differing))
    assert found.differences["no_residual"].confounds == ("model.capacity_factor", "optim.beta2")
    assert found.differences[FULL].confounds == ()
    assert found.contrasts["the gating residual"].confounds and signed(found.differences["no_residual"]).endswith("‡§")
    said = held_equal(found)
    assert f"Capacity factor: 1.1 (vanilla, {FULL}), none (no_residual)." in said and "Rate: 0.005." in said
    assert any("no_residual in model.capacity_factor, optim.beta2" in line for line in verdict(found))
    rows = {row[0]: row for row in recipe_table(found).rows}
    assert rows["no_residual"][1:] == ("none", "0.01", "30", "0.005", "§ model.capacity_factor, optim.beta2")


def test_what_a_sweep_is_about_is_not_marked():
    capacity, rate, routers = (of_sweep(name).measure.design.about for name in ("capacity", "learning_rate", "routers"))
    assert "model.capacity_factor" in capacity and "optim.lr" in rate
    assert not routers & RECIPE.keys()  # several name a rate, each of another method


def test_the_held_out_text_widens_the_interval(tmp_path):
    write_sweep(tmp_path, CLEAR)
    before = compared(TABLE6, tmp_path).differences[FULL].estimate
    generator = np.random.default_rng(0)
    document_W, text_W = np.repeat(np.arange(20), 5), np.repeat(generator.normal(0, 0.2, 20), 5)
    other = tmp_path / "windows"
    write_sweep(other, CLEAR)
    for arm, by_seed in CLEAR.items():
        for seed, loss in by_seed.items():
            nats_W = loss + text_W * (arm == FULL)
            lines = [f"{w},{d},{n}" for w, (d, n) in enumerate(zip(document_W, nats_W, strict=True))]
            write_text(other / f"trials/{arm}-{seed}/tables/val_windows.csv", "\n".join(["w,d,nats", *lines]))
    found = compared(TABLE6, other).differences[FULL].estimate
    assert found.shared.error == pytest.approx(stats.sem(text_W[::5]), rel=1e-6) and found.shared.freedom == 19
    assert found.mean == before.mean and found.half_width > before.half_width


def test_second_measures_are_paired_too(tmp_path):
    write_sweep(tmp_path, CLEAR)
    assert compared(TABLE6, tmp_path).second == {}
    for arm, by_seed in CLEAR.items():
        for seed, loss in by_seed.items():
            write_run(tmp_path / f"trials/{arm}-{seed}", loss, online_loss=5 + seed + 0.5 * (arm == FULL) + 0.01 * seed)
    found = compared(TABLE6, tmp_path)
    assert found.second["online_loss"][FULL].estimate.mean == pytest.approx(0.5)
    assert second_table(found).columns == ("arm", "training loss of the first epoch")


def test_a_speed_up_has_the_interval_of_its_pairs(tmp_path):
    write_sweep(tmp_path, CLEAR)
    for seed, (base, ours) in enumerate(((15.0, 10.0), (14.0, 10.0), (16.0, 10.0))):
        write_run(tmp_path / f"trials/vanilla-{seed}", 3.2, expert_forward_ms=base)
        write_run(tmp_path / f"trials/{FULL}-{seed}", 3.1, expert_forward_ms=ours)
    found = compared(TABLE6, tmp_path)
    row = next(
        dict(zip(cost_table(found).columns, row, strict=True)) for row in cost_table(found).rows if row[0] == FULL
    )
    logs = np.log([1.5, 1.4, 1.6])
    half = stats.t.ppf(0.975, 2) * stats.sem(logs)
    low, high = np.exp(logs.mean() - half), np.exp(logs.mean() + half)
    assert row["speed-up over seeds, 95 %"] == f"{np.exp(logs.mean()):.2f} [{low:.2f}, {high:.2f}]"


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
    assert said[4].endswith(f"no slower, so it pays in equal training time too: {FULL} (1.20 times as fast).")


def test_verdict_on_noise(tmp_path):
    said = " ".join(verdict(comparison(tmp_path, NOISY)))
    assert f"Not distinguishable from vanilla at this scale: no_residual, {FULL}." in said
    assert "neither confirmed nor refuted" in said
    assert "not distinguishable from none" in said
    assert "Lower validation loss" not in said and "Higher validation loss" not in said


def test_verdict_when_the_papers_order_holds(tmp_path):
    losses = {**CLEAR, "no_residual": {0: 3.151, 1: 3.210, 2: 3.119}}
    assert "All of these go the paper's way." in " ".join(verdict(comparison(tmp_path, losses)))


def test_a_single_pair_beyond_noise_is_one(tmp_path):
    found = comparison(tmp_path, NOISY)
    pair = (FULL, "no_residual")
    for changes, said in (
        ({"confirmed": (pair,)}, "3 pairs of these arms; here 1 differs beyond noise. It goes the paper's way."),
        ({"contradicted": (pair,)}, "here 1 differs beyond noise. 0 go the paper's way, 1 against it (no_residual"),
        ({"confirmed": (pair,), "contradicted": (pair,)}, "2 differ beyond noise. 1 goes the paper's way, 1 against"),
        ({"ranked": 1}, "ranks 1 pair of these arms; here 0 differ beyond noise."),
    ):
        assert said in " ".join(verdict(replace(found, ordering=replace(found.ordering, **changes))))


def test_of_many_arms_a_verdict_says_how_many(tmp_path):
    found = comparison(tmp_path, {**NOISY, FULL: CLEAR[FULL]})
    lower, noise = found.differences[FULL], found.differences["no_residual"]
    many = {f"arm_{n}": noise for n in range(33)}
    [said] = [line for line in verdict(replace(found, differences=many)) if "Not distinguishable" in line]
    assert "Not distinguishable from vanilla at this scale: all 33 others. That is no proof" in said
    both = many | {"better": replace(lower, p_holm=0.01)}
    [said] = [line for line in verdict(replace(found, differences=both)) if "Not distinguishable" in line]
    assert "beyond noise: better (" in said and "at this scale: 33 of 34 others, all but better. That" in said


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
