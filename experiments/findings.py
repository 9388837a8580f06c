"""Do the paper's observations on task-level expert load hold?

Paper, Section 4 and appendix: adjacent layers correlate; shallow and final layers vary most across tasks; harder tasks
do not simply use more FFN experts, though ARC-C is said to use more than ARC-E (its Fig. 4 shows fewer); zero experts
track how easy a task is; topics are assigned to different experts. None has a test there. Expected here: topics differ
and neighbours agree; the rest may be undecided in small models.
"""

from moepp.reports.experiment import Context, Experiment, Findings, Runs

from .fig4 import ARM, OPTIONS, SWEEP


def measure(context: Context) -> Findings:
    from moepp.routing.measure import expert_loads
    from moepp.routing.observations import observation_plot, observation_tables, observations
    from moepp.statistics.hypotheses import decide

    loads, about = expert_loads(context, SWEEP, ARM)
    tests = observations(loads)
    tables = observation_tables(loads, tests)
    return Findings(tables, (observation_plot(tables),), decide(tests), (about,))


EXPERIMENT = Experiment(
    name="findings",
    title="The observations on expert load, tested",
    question="Do the paper's observations on task-level expert load hold?",
    expected="topics differ and adjacent layers agree; the rest may be undecided in small models",
    measure=measure,
    reference="App. D",
    runs=(Runs(SWEEP, (ARM,)),),
    of_routing=True,
    options=OPTIONS,
    notes=(
        "How hard a task is: bits per byte of the gold answers under the same model (of the whole text where there are"
        " no questions).",
        "Each half of a task's examples is set against the other half, so that noise of examples cannot pass for a"
        " difference between tasks.",
        "p-values are corrected over all tests together (Holm). With several models the tests are over models.",
    ),
)
