"""`python -m diffsparse.eval run …` is `diffsparse eval run …`, for launchers; other words are as in `diffsparse`."""

import sys

from diffsparse.eval.cli import EVAL_COMMANDS, main

sys.exit(main(["eval", *sys.argv[1:]] if sys.argv[1:2] and sys.argv[1] in EVAL_COMMANDS else sys.argv[1:]))
