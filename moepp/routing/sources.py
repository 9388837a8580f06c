"""Which texts a study routes: the paper's tasks or tagged sentences where files are given, else held-out documents."""

import re
from pathlib import Path

from moepp.data.corpora import message_names
from moepp.data.prepare import prepare
from moepp.errors import RunError, UsageError
from moepp.evaluation.checkpoints import Checkpoint
from moepp.routing.tagged import TaggedText, read_tagged, split_words
from moepp.routing.task_texts import read_tasks
from moepp.routing.texts import Text, documents, text_windows, tokenize

MOST_DOCUMENTS = 12  # about as many groups as the paper has tasks


def task_texts(checkpoint: Checkpoint, folder: Path | None, limit: int, subject_limit: int) -> tuple[list[Text], str]:
    """Texts in groups, at most `limit` of each (of MMLU `subject_limit` of each subject), and what they are in a
    sentence.

    Without a folder of tasks the groups are held-out documents: by decade in the default corpus, else one by one, the
    longest twelve, cut into windows of the context. Raises UsageError where there are neither.
    """
    if folder is not None:
        texts = tokenize(checkpoint.require_tokenizer(), read_tasks(folder, limit, subject_limit))
        return texts, (
            f"Groups are the paper's tasks, up to {limit} examples each, of MMLU up to {subject_limit} of each subject:"
            " question and gold answer, zero-shot."
        )
    texts = text_windows(_held_out(checkpoint), checkpoint.context - 1, limit)
    what = "decades" if checkpoint.data.corpus == "sotu" else "documents"
    return texts, (
        f"No folder of tasks was given (tasks_dir=DIR): groups are {what} of the held-out split, their examples pieces"
        f" of {checkpoint.context - 1} tokens, up to {limit} each. What is said about tasks is about these."
    )


def tagged_texts(checkpoint: Checkpoint, file: Path | None, words: int) -> tuple[list[TaggedText], str]:
    """Texts of about `words` words and what they are. Without a file: the held-out documents, without tags."""
    if file is not None:
        texts = read_tagged(file, words)
        return texts, f"{len(texts)} texts of {file.name} with gold tags, {sum(len(t.tags) for t in texts)} words."
    tokenizer = checkpoint.require_tokenizer()
    texts, total = [], 0
    for text in _held_out(checkpoint):
        tagged = split_words(tokenizer.decode(text.ids.tolist(), skip_special_tokens=False))
        if total < words and len(tagged.tags):
            texts.append(tagged)
            total += len(tagged.tags)
    return texts, (
        f"No tagged text was given (pos=FILE): {len(texts)} held-out documents, {total} words, without parts of speech."
    )


def _held_out(checkpoint: Checkpoint) -> list[Text]:
    """The longest held-out documents, grouped, in their order."""
    if checkpoint.data is None:
        raise UsageError("a released checkpoint brings no held-out text: give tasks_dir=DIR (Fig. 5: pos=FILE)")
    try:
        tokens = prepare(checkpoint.data, progress=False)
    except (UsageError, RunError) as error:
        raise UsageError(
            f"the held-out text of the run is not on this machine ({error}): bring it, or give tasks_dir=DIR"
            " (Fig. 5: pos=FILE)"
        ) from None
    texts = documents(tokens.val, tokens.val_lengths, checkpoint.end_of_text)
    names = {}
    if checkpoint.data.corpus == "sotu":
        tokenizer, files = checkpoint.require_tokenizer(), message_names(checkpoint.data)
        names = {i: files.get(tokenizer.decode(text.ids.tolist()), "") for i, text in enumerate(texts)}
    named = [text.named(decade(names.get(i, "")) or f"document {i + 1}") for i, text in enumerate(texts)]
    if checkpoint.data.corpus == "sotu":
        return sorted(named, key=lambda text: text.group)
    longest = sorted(range(len(named)), key=lambda i: -len(named[i].ids))[:MOST_DOCUMENTS]
    return [named[i] for i in sorted(longest)]


def decade(name: str) -> str:
    """ "1790s" of "1790-Washington-1"; "" of a name without a year."""
    year = re.match(r"(\d{3})\d\D", name)
    return f"{year[1]}0s" if year else ""
