from moepp.statistics.wording import NAMED, among, several


def test_one_is_no_plural():
    assert [several(n, "new trial") for n in (0, 1, 2)] == ["0 new trials", "1 new trial", "2 new trials"]


def test_more_names_than_a_sentence_holds_are_counted():
    names = [f"a{n}" for n in range(2 * NAMED + 2)]
    assert among(names[:NAMED], names, "arm") == ", ".join(names[:NAMED])
    assert among(names, names, "other") == "all 18 others"
    assert among(names[2:], names, "arm") == "16 of 18 arms, all but a0, a1"
    assert among(names[: NAMED + 1], names, "arm") == "9 of 18 arms"
