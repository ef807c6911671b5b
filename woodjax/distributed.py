"""Several processes: what JAX leaves to the script."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def fail_together() -> Iterator[None]:
    """Let an exception end this process at once, so that no other one waits for it.

    An exception that leaves a script is followed by the shutdown of `jax.distributed`, which waits for all processes;
    these wait in a collective for the one that failed, for minutes or for ever. Here the trace is printed and
    the process is gone with status 1: the others see a lost connection, or no heartbeat, and end as well. With one
    process an exception goes on as usual.

    Yields:
        Nothing.

    Raises:
        KeyboardInterrupt: And every exception, where there is one process.

    Cost:
        None.

    Example:
        >>> import woodjax as wj
        >>> with wj.fail_together():
        ...     pass  # everything after jax.distributed.initialize
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or (isinstance(error, SystemExit) and not error.code):
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
