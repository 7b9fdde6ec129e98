"""`python -m diffsparse.eval`, the same as `diffsparse`."""

import sys

from diffsparse.eval.cli import main

sys.exit(main())
