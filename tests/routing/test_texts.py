import gzip
import json

import numpy as np
import pytest

from moepp.data.corpora import message_names
from moepp.data.settings import DataConfig
from moepp.data.tokenizer import train_bpe
from moepp.errors import UsageError
from moepp.routing.sources import decade
from moepp.routing.tagged import ACROSS, FIRST, LATER, NO_CLASS, NO_LETTER, WHOLE, align, read_tagged, split_words
from moepp.routing.task_texts import AREA, TASKS, read_tasks
from moepp.routing.texts import Passage, Text, documents, text_windows, tokenize

ROWS = {  # one row in the columns of each stock task, and its question and gold answer
    "sciq": ({"question": "Who?", "distractor1": "a", "distractor2": "b", "distractor3": "c",
              "correct_answer": "darwin", "support": " Long ago."}, "Long ago.\nQuestion: Who?\nAnswer:", " darwin"),
    "piqa": ({"goal": "Open it", "sol1": "push", "sol2": "pull", "label": 1}, "Question: Open it\nAnswer:", " pull"),
    "winogrande": ({"sentence": "Ann beat Eve, so _ won.", "option1": "Ann", "option2": "Eve", "answer": "1"},
                   "Ann beat Eve, so Ann", " won."),
    "arc_easy": ({"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
                 "Question: Hot?\nAnswer:", " fire"),
    "arc_challenge": ({"question": "Cold?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
                       "answerKey": "1"}, "Question: Cold?\nAnswer:", " ice"),
    "hellaswag": ({"activity_label": "Roofing", "ctx_a": "A man sits.", "ctx_b": "he", "label": "0",
                   "endings": ["[substeps] stands  up.", "b", "c", "d"]}, "Roofing: A man sits. He", "  stands up."),
    "logiqa": ({"context": "All.", "question": "Which?", "options": ["w", "x", "y", "z"], "label": "c"},
               "Passage: All.\nQuestion: Which?\nChoices:\nA. w\nB. x\nC. y\nD. z\nAnswer:", " y"),
    "boolq": ({"question": "is it", "passage": "It is.", "label": 1}, "It is.\nQuestion: is it?\nAnswer:", " yes"),
    "lambada_openai": ({"text": "I do not care about signs"}, "I do not care about", " signs"),
    "nq_open": ({"question": "who sang", "answer": ["Bobby", "Bob"]}, "Q: who sang?\nA:", " Bobby"),
    "mmlu": ({"question": " Find it. ", "subject": "astronomy", "choices": ["0", "4", "2", "6"], "answer": 1},
             "Find it.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:", " B"),
}  # fmt: skip


def write_rows(path, rows):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def tokenizer():
    """Splits most words, and characters of several bytes into their bytes."""
    return train_bpe(["the cat sat on the mat, the naïve cat", "and then the dog"] * 5, 290)


@pytest.mark.parametrize("name", TASKS)
def test_a_question_is_put_as_the_harness_puts_it_with_the_gold_answer(name, tmp_path):
    row, question, answer = ROWS[name]
    write_rows(tmp_path / f"{name}.jsonl", [row])
    [passage] = read_tasks(tmp_path, 10, 10)
    assert passage.text == question + answer and passage.text[passage.answer :] == answer
    assert passage.group == TASKS[name][0]
    assert (passage.topic, passage.subject) == (("STEM", "astronomy") if name == "mmlu" else ("", ""))


def test_examples_are_spread_over_a_file_and_limited(tmp_path):
    write_rows(tmp_path / "nq_open.jsonl.gz", [{"question": str(i), "answer": ["x"]} for i in range(100)])
    write_rows(tmp_path / "boolq_validation.jsonl", [ROWS["boolq"][0]])
    write_rows(tmp_path / "boolq_train.jsonl", [ROWS["boolq"][0]] * 9)
    passages = read_tasks(tmp_path, 5, 3)
    assert [p.text.split("?")[0] for p in passages if p.group == "NQ"] == ["Q: 0", "Q: 24", "Q: 49", "Q: 74", "Q: 99"]
    assert sum(p.group == "BoolQ" for p in passages) == 1


def test_every_subject_has_its_own_limit(tmp_path):
    row, *_ = ROWS["mmlu"]
    subjects = ["astronomy"] * 40 + ["virology"] * 10 + ["marketing"] * 2
    rows = [row | {"subject": subject, "question": str(i)} for i, subject in enumerate(subjects)]
    write_rows(tmp_path / "mmlu_test.jsonl", rows)
    passages = read_tasks(tmp_path, 2, 3)
    found = [(p.subject, int(p.text.split("\n")[0])) for p in passages]
    assert found == [*(("astronomy", i) for i in (0, 19, 39)), *(("virology", i) for i in (40, 44, 49)),
                     ("marketing", 50), ("marketing", 51)]  # fmt: skip
    assert [p.topic for p in passages] == ["STEM"] * 3 + ["other"] * 5


def test_subjects_of_mmlu_fall_into_four_areas():
    assert len(AREA) == 57 and set(AREA.values()) == {"STEM", "humanities", "social sciences", "other"}


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"question": "x"}\n', r"sciq.jsonl line 1 lacks columns of the task sciq \(KeyError: 'support'\)"),
     ("no json\n", "sciq.jsonl line 1 lacks columns"), ("[1]\n", "sciq.jsonl line 1 lacks columns")],
)  # fmt: skip
def test_other_files_are_refused_in_a_line(tmp_path, content, message):
    (tmp_path / "sciq.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_tasks(tmp_path, 5, 5)


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no task: expected files such as sciq, piqa, winogrande"):
        read_tasks(tmp_path, 5, 5)


def test_the_answer_begins_at_its_first_token(tokenizer):
    question, answer = "the naïve", " cat"
    texts = tokenize(tokenizer, [Passage("", "empty"), Passage(question + answer, "g", answer=len(question))])
    [text] = texts  # a text without a token is left out
    assert tokenizer.decode(text.ids[text.answer :].tolist()) == answer
    assert text.bytes.sum() == len((question + answer).encode()) and text.bytes[text.answer :].sum() == len(answer)


def test_documents_and_windows_of_a_held_out_split():
    ids = np.array([5, 6, 7, 8, 9, 0, 0, 3, 4, 0], dtype="<u2")
    lengths = np.arange(10, dtype="<u4")
    found = documents(ids, lengths, end_of_text=0)
    assert [text.ids.tolist() for text in found] == [[5, 6, 7, 8, 9], [3, 4]]
    pieces = text_windows([text.named(f"d{i}") for i, text in enumerate(found)], 2, limit=10)
    assert [(p.ids.tolist(), p.bytes.tolist(), p.group) for p in pieces] == [
        ([5, 6], [0, 1], "d0"), ([7, 8], [2, 3], "d0"), ([3, 4], [7, 8], "d1"),
    ]  # fmt: skip
    many = text_windows([Text(np.arange(1, 101), np.ones(100), "g")], 10, limit=3)
    assert [int(p.ids[0]) for p in many] == [1, 41, 91]


def test_messages_of_the_default_corpus_are_grouped_by_decade():
    names = message_names(DataConfig())
    assert len(names) > 200 and {decade(name) for name in names.values()} >= {"1790s", "1860s", "2010s"}
    assert any(text.startswith("Fellow-Citizens of the Senate") for text in names)
    assert decade("speech") == ""


def parts_of(tokenizer, tagged):
    """(bytes of the token, word, part) of every token of a text."""
    encoding = tokenizer.encode(tagged.text)
    words, parts = align(np.array(encoding.offsets), tagged)
    return [(tokenizer.id_to_token(i), int(w), p) for i, w, p in zip(encoding.ids, words, parts, strict=True)]


def test_tokens_are_aligned_to_words_whatever_the_bytes_of_their_characters(tokenizer):
    tagged = split_words("the naïve 東 𠮷 cat zebra")
    found = parts_of(tokenizer, tagged)
    by_word = {w: [p for _, word, p in found if word == w] for w in range(len(tagged.tags))}
    assert by_word[0] == [WHOLE] and by_word[4] == [WHOLE]
    for word, least in ((2, 3), (3, 4)):  # characters of 3 and 4 bytes, a token or more for each byte
        assert len(by_word[word]) >= least and by_word[word] == [FIRST] + [LATER] * (len(by_word[word]) - 1)
    assert by_word[5][0] == FIRST and set(by_word[5][1:]) == {LATER}
    assert all(word >= 0 or part == "" for _, word, part in found)
    for word, (start, end) in enumerate(tagged.spans):  # the words' tokens are their bytes, no more and no fewer
        ids = [tokenizer.token_to_id(token) for token, w, _ in found if w == word]
        assert tokenizer.decode(ids).strip() == tagged.text[start:end]


def test_punctuation_and_numbers_are_neither_words_nor_fragments(tokenizer):
    tagged = split_words("the cat, 1984 🙂 sat!")
    by_word = {word: part for _, word, part in parts_of(tokenizer, tagged)}
    words = [tagged.text[start:end] for start, end in tagged.spans]
    without = [words[word] for word, part in by_word.items() if part == NO_LETTER]
    assert words == ["the", "cat", ",", "1984", "🙂", "sat", "!"] and without == [",", "1984", "🙂", "!"]


def test_a_token_over_two_words_belongs_to_none():
    tagged = split_words("ab cd ef")
    words, parts = align(np.array([[0, 4], [4, 5], [5, 8]]), tagged)
    assert words.tolist() == [-1, 1, 2] and parts == [ACROSS, FIRST, WHOLE]


def test_words_of_untagged_text():
    tagged = split_words("Don't re-use it, naïve 🙂!")
    assert [tagged.text[a:b] for a, b in tagged.spans] == ["Don't", "re-use", "it", ",", "naïve", "🙂", "!"]
    assert set(tagged.tags) == {""}


def test_tagged_sentences_of_a_file_are_one_text(tmp_path):
    path = tmp_path / "tagged.jsonl"
    rows = [("f1", ["The", "cat"], ["DET", "NOUN"]), ("f1", ["sat"], ["VERB"]), ("f2", ["naïve"], ["ADJ"])]
    write_rows(path, [{"file": f, "words": w, "pos": p} for f, w, p in rows])
    texts = sorted(read_tagged(path, 100), key=lambda t: -len(t.text))
    assert [t.text for t in texts] == ["The cat sat", "naïve"]
    assert texts[0].tags == ("DET", "NOUN", "VERB")
    assert [texts[0].text[a:b] for a, b in texts[0].spans] == ["The", "cat", "sat"]
    assert len(read_tagged(path, 1)) == 1
    write_rows(path, [{"words": ["not", ".", "12", "its"], "pos": [".", ".", "NUM", "PRP$"]}])
    assert read_tagged(path, 9)[0].tags == (NO_CLASS, ".", "NUM", "PRP$")
    write_rows(path, [{"words": ["a"], "pos": ["X"]}] * 3)
    assert len(read_tagged(path, 100)) == 3  # without names, each line is a text


@pytest.mark.parametrize(
    "line", ['{"words": ["a"], "pos": []}', '{"words": ["a"]}', "nothing", '{"words": [1], "pos": ["X"]}']
)
def test_other_tagged_lines_are_refused(tmp_path, line):
    path = tmp_path / "tagged.jsonl"
    path.write_text('{"words": ["a"], "pos": ["X"]}\n' + line + "\n")
    with pytest.raises(UsageError, match="line 2 is not"):
        read_tagged(path, 10)
