"""`python -m woodjax` is the command `woodjax`."""

import sys

from woodjax.cli import main

sys.exit(main())
