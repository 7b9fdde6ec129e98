"""A process that says that it keeps a device busy, and sleeps: for tests of what starts and ends such processes."""

import sys
import time

from diffsparse.eval.child_process import follow_parent
from diffsparse.eval.stress_load import RUNNING

if __name__ == "__main__":
    follow_parent()
    if sys.argv[1] == "broken":
        sys.exit("no memory left")
    if sys.argv[1] != "silent":
        print(RUNNING, flush=True)
    time.sleep(1000)
