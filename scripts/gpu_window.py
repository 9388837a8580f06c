"""A short time on a GPU, used by one command that was rehearsed without one: docs/gpu.md.

python scripts/gpu_window.py pack                        with a network: what the GPU's machine lacks, in .gpu_window/
python scripts/gpu_window.py run --minutes 9 --out DIR   there: tests, measurements and runs, stage after stage
python scripts/gpu_window.py keep DIR                    back here: into results/; says what docs/results.md lacks
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # nothing is installed on the GPU's machine

from moepp.errors import RunError, UsageError  # noqa: E402


def main() -> int:
    options = _parser().parse_args()
    try:
        return options.command(options) or 0
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="pack | run | keep")

    pack = commands.add_parser("pack", help="gather what a GPU's machine without a network lacks")
    pack.add_argument("--to", type=Path, default=ROOT / ".gpu_window", help="folder to replace")
    pack.add_argument("--text", type=Path, help="text to train on, documents between blank lines")
    pack.set_defaults(command=_pack)

    run = commands.add_parser("run", help="stage after stage; a second call continues with what is missing")
    run.add_argument("--minutes", type=float, required=True, help="for everything")
    run.add_argument("--out", type=Path, required=True, help="folder for summary.md, state.json and window.tar.gz")
    run.add_argument("--stages", nargs="+", metavar="STAGE", help="instead of all that are not done")
    run.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal at smoke sizes")
    run.add_argument("--pack", type=Path, default=ROOT / ".gpu_window", help="what `pack` has made")
    run.set_defaults(command=_run)

    keep = commands.add_parser("keep", help="bring what came back into results/")
    keep.add_argument("folder", type=Path, metavar="DIR", help="the --out of `run`")
    keep.add_argument("--name", help="folder below results/<benchmark>/; default: the card's, such as h100")
    keep.add_argument("--results", type=Path, default=ROOT / "results")
    keep.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: keep a rehearsal")
    keep.set_defaults(command=_keep)
    return parser


def _pack(options: argparse.Namespace) -> None:
    from window.pack import pack

    print(pack(options.to, options.text))


def _run(options: argparse.Namespace) -> int:
    from window.node import run

    return run(options.minutes, options.out, options.device, options.pack, options.stages)


def _keep(options: argparse.Namespace) -> None:
    from window.keep import keep

    print("\n".join(keep(options.folder, options.results, options.name, options.device)))


if __name__ == "__main__":
    sys.exit(main())
