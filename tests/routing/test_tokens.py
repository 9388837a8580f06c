from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from moepp.routing import tokens as token_use
from moepp.routing.token_report import frequency_table, paper_table, string_plot, tag_table, token_claims
from moepp.routing.tokens import TokenUse, by_label, difference, frequency_class, loss_correlation

TEXTS, TOKENS = 40, 60


@pytest.fixture
def use():
    """Verbs, a third of them AUX, use 1.6 FFN experts, nouns 1.4, "." 1.0; fragments 0.3 less; texts differ, and one
    has "rare" in it.
    """
    generator = np.random.default_rng(0)
    text_T = np.repeat(np.arange(TEXTS), TOKENS)
    tag_T = generator.choice(["VERB", "NOUN", "."], TEXTS * TOKENS)
    part_T = generator.choice(["whole word", "later fragment"], TEXTS * TOKENS).astype("<U20")
    part_T[tag_T == "."] = "no letter"
    mean = np.select([tag_T == "VERB", tag_T == "NOUN"], [1.6, 1.4], 1.0) - 0.3 * (part_T == "later fragment")
    tag_T[(tag_T == "VERB") & (generator.random(TEXTS * TOKENS) < 1 / 3)] = "AUX"
    ffn_T = mean + generator.normal(0, 0.1, TEXTS)[text_T] + generator.normal(0, 0.2, TEXTS * TOKENS)
    string_T = np.char.add("s", (np.arange(TEXTS * TOKENS) % 7).astype(str)).astype("<U5")
    string_T[:2] = "rare"
    nats_T = 2 * (ffn_T - mean) + generator.normal(0, 0.4, TEXTS * TOKENS)
    return TokenUse(text_T, ffn_T, nats_T, string_T, tag_T, part_T)


def test_labels_have_their_mean_over_tokens_and_an_interval_over_texts(use):
    found = by_label(use, use.tag_T)
    assert {one.label for one in found[:2]} == {"VERB", "AUX"}
    assert [one.label for one in found[2:]] == ["NOUN", "."]
    for one in found:
        here = use.tag_T == one.label
        assert one.ffn.value == pytest.approx(use.ffn_T[here].mean())
        assert (one.tokens, one.texts) == (here.sum(), TEXTS)
        over_tokens = 1.96 * use.ffn_T[here].std() / here.sum() ** 0.5
        assert one.ffn.high - one.ffn.value > 1.3 * over_tokens  # tokens of a text go together
    verbs = next(one for one in found if one.label == "VERB")
    assert verbs.ffn.low < 1.45 < verbs.ffn.high


def test_a_label_of_one_text_has_no_interval_and_one_without_a_name_is_left_out(use):
    use.string_T[2:5] = ""
    found = {one.label: one for one in by_label(use, use.string_T)}
    assert "" not in found and sum(one.tokens for one in found.values()) == len(use.ffn_T) - 3
    assert found["rare"].tokens == 2 and np.isnan(found["rare"].ffn.low)


def test_one_text_decides_nothing(use):
    one = use.select(use.text_T == 0)
    claims = token_claims({"a": one})
    assert claims and {claim.verdict for claim in claims} == {"undecided"}
    assert all((claim.low, claim.high, claim.p) == (None, None, 1.0) for claim in claims)
    assert str(claims[0]).endswith("; one model, no interval over its examples") and "[" not in str(claims[0])
    assert "holds" in {claim.verdict for claim in token_claims({"a": use})}


def test_labels_taken_in_parts_give_the_same(use, monkeypatch):
    whole = by_label(use, use.string_T)
    monkeypatch.setattr(token_use, "LABELS_AT_A_TIME", 3)
    parts = by_label(use, use.string_T)
    assert [one.label for one in parts] == [one.label for one in whole]
    assert [one.ffn.low for one in parts] == pytest.approx([one.ffn.low for one in whole], nan_ok=True)


def test_a_difference_is_the_first_side_minus_the_second(use):
    found = difference(use, np.isin(use.tag_T, ("VERB", "AUX")), use.tag_T == "NOUN")
    assert found.interval.value == pytest.approx(0.2, abs=0.03)
    assert found.interval.low > 0 and found.p < 0.01


def test_claims_on_planted_verbs_and_fragments_hold(use):
    found = {claim.statement: claim for claim in token_claims({"one": use})}
    assert len(found) == 9 and all(claim.verdict == "holds" for claim in found.values())
    fragments = found["Word fragments use fewer FFN experts than whole words"]
    assert fragments.effect == pytest.approx(-0.3, abs=0.05)  # punctuation, which uses fewest, is no word
    for classes in ("other words", "nouns (NOUN)"):
        assert found[f"Verbs (VERB) use more FFN experts than {classes}"].effect == pytest.approx(0.2, abs=0.03)
    reversed_use = replace(use, ffn_T=-use.ffn_T)
    assert all(claim.verdict == "fails" for claim in token_claims({"one": reversed_use}))


def test_verbs_are_judged_without_auxiliaries(use):
    """Auxiliaries are a third of them here and most of them in English: a class that is mostly these tells of these."""
    use.ffn_T[use.tag_T == "AUX"] += 1
    found = {claim.statement: claim.effect for claim in token_claims({"one": use})}
    assert found["Verbs (VERB) use more FFN experts than other words"] == pytest.approx(0.2, abs=0.03)
    assert found["Auxiliary verbs (AUX) use more FFN experts than other words"] == pytest.approx(1.2, abs=0.03)


def test_what_only_frequency_makes_is_gone_at_equal_frequency(use):
    """Frequent strings use more FFN experts, and verbs are frequent: nothing else tells verbs from nouns."""
    generator = np.random.default_rng(1)
    verb_T = np.isin(use.tag_T, ("VERB", "AUX"))
    frequent_T = generator.random(len(verb_T)) < np.where(verb_T, 0.8, 0.2)
    rare_T = np.char.add("r", generator.integers(0, 200, len(verb_T)).astype(str))
    string_T = np.where(frequent_T, np.char.add("f", generator.integers(0, 4, len(verb_T)).astype(str)), rare_T)
    planted = replace(use, string_T=string_T, ffn_T=1.0 + 0.5 * frequent_T + generator.normal(0, 0.1, len(verb_T)))
    found = {claim.statement: claim for claim in token_claims({"one": planted})}
    raw = found["Verbs (VERB) use more FFN experts than other words"]
    assert raw.verdict == "holds" and raw.effect > 0.2
    controlled = found["Verbs (VERB) use more FFN experts than other words of the same frequency"]
    assert controlled.verdict == "undecided" and abs(controlled.effect) < 0.03


def test_a_loss_that_only_the_string_makes_is_gone_within_strings(use):
    generator = np.random.default_rng(2)
    hard_T = use.string_T > "s3"
    planted = replace(
        use,
        nats_T=5.0 * hard_T + generator.normal(0, 1, len(hard_T)),
        ffn_T=1.0 * hard_T + generator.normal(0, 1, len(hard_T)),
    )
    over, within = loss_correlation(planted), loss_correlation(planted, within_string=True)
    assert over.interval.value > 0.3 and over.interval.low > 0 and over.p < 0.01
    assert within.interval.low < 0 < within.interval.high and within.p > 0.05
    assert over.interval.value == pytest.approx(stats.spearmanr(planted.nats_T, planted.ffn_T).statistic)
    assert loss_correlation(use, within_string=True).interval.low > 0.3  # planted in every string


def test_frequency_classes_hold_whole_strings_and_about_equally_many_tokens():
    string_T = np.repeat(np.array([f"s{i}" for i in range(60)]), np.arange(1, 61))
    class_T = frequency_class(string_T, classes=5)
    assert all(len(set(class_T[string_T == string])) == 1 for string in set(string_T))
    assert np.bincount(class_T) == pytest.approx(len(string_T) / 5, rel=0.2)
    assert class_T[string_T == "s0"] == [0] and set(class_T[string_T == "s59"]) == {4}


def test_the_table_by_frequency_has_the_loss_beside_it(use):
    rows = frequency_table({"one": use}).rows
    assert [row[0] for row in rows] == sorted(row[0] for row in rows) and sum(row[1] for row in rows) == len(use.ffn_T)
    classes = frequency_class(use.string_T)
    assert rows[-1][-1] == pytest.approx(use.nats_T[classes == classes.max()].mean())


def test_the_data_of_the_figure_hold_every_string(use):
    rows = string_plot({"one": use, "two": use}).data.rows
    assert {row[0] for row in rows} == {"rare", *(f"s{i}" for i in range(7))}


def test_auxiliary_verbs_have_a_row_of_their_own(use):
    assert {row[0] for row in tag_table({"one": use}).rows if row[1] == "all"} == {"VERB", "AUX", "NOUN", "."}


def test_strings_of_the_paper_stand_beside_both_forms_of_ours(use):
    use.string_T[:] = np.where(use.string_T == "s0", "␣week", np.where(use.string_T == "s1", "week", use.string_T))
    use.string_T[4] = "␣jack"
    table = paper_table({"one": use}, {"week": 1.57, "jack": 1.62, "anya": 1.35})
    week, jack, anya = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    for form in ("␣x", "x"):
        here = use.string_T == form.replace("x", "week")
        assert week[f"{form}: tokens"] == here.sum() > 100
        assert week[f"{form}: FFN experts per token"] == pytest.approx(use.ffn_T[here].mean())
        assert week[f"{form}: low"] < week[f"{form}: FFN experts per token"] < week[f"{form}: high"]
    assert (jack["␣x: tokens"], jack["␣x: low"], jack["x: tokens"]) == (1, None, None)
    assert anya["paper"] == 1.35 and set(list(anya.values())[2:]) == {None}
