import numpy as np
import pytest

from moepp.analysis import token_use
from moepp.analysis.token_report import claims, string_plot
from moepp.analysis.token_use import TokenUse, by_label, difference

TEXTS, TOKENS = 40, 60


@pytest.fixture
def use():
    """Verbs use 1.6 FFN experts, nouns 1.4, "." 1.0; fragments 0.3 less; texts differ, and one has "rare" in it."""
    generator = np.random.default_rng(0)
    text_T = np.repeat(np.arange(TEXTS), TOKENS)
    tag_T = generator.choice(["VERB", "NOUN", "."], TEXTS * TOKENS)
    part_T = generator.choice(["whole word", "later fragment"], TEXTS * TOKENS)
    mean = np.select([tag_T == "VERB", tag_T == "NOUN"], [1.6, 1.4], 1.0) - 0.3 * (part_T == "later fragment")
    ffn_T = mean + generator.normal(0, 0.1, TEXTS)[text_T] + generator.normal(0, 0.2, TEXTS * TOKENS)
    string_T = np.char.add("s", (np.arange(TEXTS * TOKENS) % 7).astype(str)).astype("<U4")
    string_T[:2] = "rare"
    return TokenUse(text_T, ffn_T, string_T, tag_T, part_T)


def test_labels_have_their_mean_over_tokens_and_an_interval_over_texts(use):
    found = by_label(use, use.tag_T)
    assert [one.label for one in found] == ["VERB", "NOUN", "."]
    for one in found:
        here = use.tag_T == one.label
        assert one.ffn.value == pytest.approx(use.ffn_T[here].mean())
        assert (one.tokens, one.texts) == (here.sum(), TEXTS)
        over_tokens = 1.96 * use.ffn_T[here].std() / here.sum() ** 0.5
        assert one.ffn.high - one.ffn.value > 1.3 * over_tokens  # tokens of a text go together
    assert found[0].ffn.low < 1.45 < found[0].ffn.high


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
    found = difference(use, use.tag_T == "VERB", use.tag_T == "NOUN")
    assert found.interval.value == pytest.approx(0.2, abs=0.03)
    assert found.interval.low > 0 and found.p < 0.01


def test_claims_on_planted_verbs_and_fragments_hold(use):
    found = {claim.statement: claim for claim in claims({"one": use})}
    assert len(found) == 4 and all(claim.verdict == "holds" for claim in found.values())
    fragments = found["Word fragments use fewer FFN experts than whole words"]
    assert fragments.effect == pytest.approx(-0.3, abs=0.05)
    reversed_use = TokenUse(use.text_T, -use.ffn_T, use.string_T, use.tag_T, use.part_T)
    assert all(claim.verdict == "fails" for claim in claims({"one": reversed_use}))


def test_the_data_of_the_figure_hold_every_string(use):
    rows = string_plot({"one": use, "two": use}).data.rows
    assert {row[0] for row in rows} == {"rare", *(f"s{i}" for i in range(7))}
