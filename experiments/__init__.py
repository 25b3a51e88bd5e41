"""The application: every command is a module of this package. The library `staff` imports none of it.

Importing it prepares the process for a command, since every command and every worker of a sweep does so first: how
OpenMP's threads wait, which cannot be set once torch is loaded, and that modules of your own are found.
"""

import os
import sys

from experiments.threads import wait_passively

wait_passively()
# Last, so that a package of the same name in the working folder shadows nothing.
if (_here := os.getcwd()) not in sys.path:
    sys.path.append(_here)
