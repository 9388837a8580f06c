import numpy as np
import pytest

from moepp.routing import tokens as token_use
from moepp.routing.token_report import claims, paper_table, string_plot, tag_table
from moepp.routing.tokens import TokenUse, by_label, difference

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
    return TokenUse(text_T, ffn_T, string_T, tag_T, part_T)


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
    found = {claim.statement: claim for claim in claims({"one": use})}
    assert len(found) == 4 and all(claim.verdict == "holds" for claim in found.values())
    fragments = found["Word fragments use fewer FFN experts than whole words"]
    assert fragments.effect == pytest.approx(-0.3, abs=0.05)  # punctuation, which uses fewest, is no word
    for classes in ("other words", "nouns (NOUN)"):  # auxiliary verbs are verbs, here and in the paper
        assert found[f"Verbs (VERB and AUX) use more FFN experts than {classes}"].effect == pytest.approx(0.2, abs=0.03)
    reversed_use = TokenUse(use.text_T, -use.ffn_T, use.string_T, use.tag_T, use.part_T)
    assert all(claim.verdict == "fails" for claim in claims({"one": reversed_use}))


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
