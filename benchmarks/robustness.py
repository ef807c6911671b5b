"""Every public function with every argument spoiled in every way: right answers, clear errors, defects.

The calls and what is asked of them are those of `tests/robustness_calls.py`; `--quick` makes only those that must be
refused.
"""

import collections
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # thousands of small programs, each run once
sys.path.insert(1, str(Path(__file__).parent.parent / "tests"))

from records import Recorder, parser, pin_blas, read


def main() -> int:
    """Make the calls, a record for each function, argument mutation and outcome."""
    pin_blas()
    options = parser(__doc__.splitlines()[0]).parse_args()
    import jax
    import robustness_calls as calls
    import robustness_cases as cases

    recorder = Recorder(options.json, "robustness", "mlp of three leaves", "random numbers")
    done = {record["method"] for record in read(options.json)} if options.json.exists() else set()  # cut off before
    for name in cases.CASES:
        if name in done:
            continue
        start, counts, defects = time.monotonic(), collections.Counter(), []
        for spoiled in calls.spoiled_calls(name):
            if options.quick and spoiled.expected != "refuse":
                continue
            outcome = calls.run(spoiled)
            counts[spoiled.mutation, outcome.kind] += 1
            if outcome.kind == "defect":
                defects.append(f"{spoiled.argument}, {spoiled.mutation}: {outcome.words}")
        for (mutation, kind), count in counts.items():
            config = {"mutation": mutation, "outcome": kind, "quick": options.quick}
            recorder.add("calls", count, "calls", method=name, column=None, config=config)
        for defect in defects:
            print(name, defect, flush=True)
        recorder.add("seconds", time.monotonic() - start, "s", method=name, column=None)
        jax.clear_caches()
    return 0


if __name__ == "__main__":
    sys.exit(main())
