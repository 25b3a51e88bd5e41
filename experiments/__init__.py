"""The application: whatever is run by name is found here. No part of the library `staff` imports it.

Importing it tells OpenMP how threads wait, since every command and every worker of a sweep does so first, and it
cannot be told once torch is loaded.
"""

from experiments.threads import wait_passively

wait_passively()
