"""Which tokens use many FFN experts?

Paper, Fig. 5 (7B, tau 0.75, mean over layers, more than 60,000 tokens of an unnamed corpus, 37 strings chosen by hand):
verbs use most (1.6 to 1.78), nouns 1.5 to 1.7, word fragments 1.17 to 1.5. Its verbs include "will" and "is". Expected
here: fragments use fewer than whole words; verbs and nouns may not differ.
"""

from moepp.reports.experiment import Context, Experiment, Findings, Runs
from moepp.statistics.tables import Table

SWEEP, ARM = "gating_residual", "moepp"
PAPER = {  # read off the bars, within 0.01
    "touch": 1.78, "ground": 1.77, "needed": 1.77, "will": 1.76, "between": 1.76, "fit": 1.75, "got": 1.75,
    "done": 1.73, "is": 1.72, "interview": 1.70, "coffee": 1.67, "breakfast": 1.67, "happy": 1.67, "big": 1.65,
    "spend": 1.65, "threw": 1.64, "jack": 1.62, "eat": 1.61, "sugar": 1.61, "milk": 1.59, "baby": 1.58, "week": 1.57,
    "dark": 1.55, "ups": 1.50, "rie": 1.46, "ings": 1.40, "itor": 1.39, "andy": 1.38, "ather": 1.37, "icken": 1.37,
    "anya": 1.35, "pper": 1.35, "aper": 1.32, "oe": 1.28, "s": 1.26, "ts": 1.24, "ried": 1.17,
}  # fmt: skip


def measure(context: Context) -> Findings:
    from moepp.routing.measure import token_uses
    from moepp.routing.token_report import (
        frequency_table,
        label_plot,
        paper_plot,
        paper_table,
        part_table,
        string_plot,
        tag_table,
        token_claims,
    )

    uses, about = token_uses(context, SWEEP, ARM)
    tags, parts, frequency, paper = tag_table(uses), part_table(uses), frequency_table(uses), paper_table(uses, PAPER)
    plots = [string_plot(uses), paper_plot(paper), label_plot(parts, "by_part", "part")]
    if tags:
        plots.append(label_plot(tags, "by_tag", "part of speech"))
    tables = (*([tags] if tags else []), parts, frequency, paper)
    return Findings(tables, tuple(plots), token_claims(uses), (about,))


EXPERIMENT = Experiment(
    name="fig5",
    title="FFN experts by token",
    question="Which tokens use many FFN experts: verbs, whole words, frequent ones, or those with a high loss?",
    expected="word fragments use fewer FFN experts than whole words; verbs and nouns may not differ",
    measure=measure,
    reference="Fig. 5",
    runs=(Runs(SWEEP, (ARM,)),),
    of_routing=True,
    options={
        "pos": 'text with parts of speech, JSONL(.gz) of {"words": [...], "pos": [...]}',
        "words": "how many words to route",
        "weights": "folder of a released checkpoint in place of trained runs",
    },
    paper=(
        Table("paper", "7B/(16+4)E, tau 0.75, mean over layers; strings chosen by hand.",
              ("string", "FFN experts per token"), tuple(PAPER.items())),
    ),
    notes=(
        "Every token of the texts counts; strings are named in the figure by rank, not by choice.",
        "A word has a letter: punctuation and numbers are neither words nor fragments, and stand apart in the tables.",
        "Fragments are tokens that hold part of a word only. How many words are split depends on the tokenizer.",
        "Verbs are the words tagged VERB; auxiliaries (AUX), which are most of the verbs' tokens, are judged apart."
        " Nouns are those tagged NOUN (names, PROPN, are other words). All are compared as whole words: a class whose"
        " words are split more often has more fragments.",
        "Frequency is counted in these texts. A token's loss is that of predicting it; its FFN experts are those that"
        " it is itself sent to.",
    ),
)  # fmt: skip
