"""Does what MoE++ wins over vanilla MoE grow or shrink with size and tokens?

Both families are trained at several sizes and to several lengths, and a power law is fitted to each: without its
largest size, which it must then predict, and with it, for the speed-up and for the paper's 0.6B. Expected here: the law
predicts the held-out size; to reach the paper's 0.6B from here takes five orders of magnitude of tokens, so that hardly
anything is said of it.
"""

from moepp.reports.experiment import Context, Experiment, Findings, Runs

SWEEP = "ladder"


def measure(context: Context) -> Findings:
    from moepp.reports import ladder
    from moepp.reports.answer import Answer
    from moepp.reports.ladder_figures import losses_figure, speedups_figure
    from moepp.reports.sweep_report import with_answer
    from moepp.sweeps.reading import read_sweep

    results, sweep = context.results(SWEEP), read_sweep(SWEEP)
    rungs = list(ladder.rungs_of(results))
    laws, notes = ladder.laws_of(rungs)
    held, claims = ladder.held_out(rungs)
    tables, figures = [ladder.parameter_table(laws, rungs), held], [losses_figure(rungs, laws)]
    first = "No answer yet: a law of each family is needed."
    if ratios := ladder.compute_ratios(rungs, laws):
        first, speedups = ladder.growth(ratios), ladder.speedup_table(ratios)
        tables += [speedups, ladder.prediction_table(laws)]
        figures.append(speedups_figure(speedups))
    found = Findings(tuple(tables), tuple(figures), tuple(claims), notes=(*sweep.notes, *notes))
    return with_answer(found, Answer(first, ()), results, sweep.primary, sweep.exclusions)


EXPERIMENT = Experiment(
    name=SWEEP,
    title="A ladder of sizes and tokens",
    question="Does what MoE++ wins over vanilla MoE grow or shrink with size and tokens?",
    expected="the law predicts the held-out size within its interval; of the paper's 0.6B it says little.",
    measure=measure,
    runs=(Runs(SWEEP),),
    scales=("smoke", "laptop", "desk", "gpu"),
)
