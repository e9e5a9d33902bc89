"""Running sweeps, storing results, rebuilding tables and figures."""

import os

# Threads that wait by spinning slow every process of a busy machine many times over; read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without huge pages, half the time of filling a large tensor anew goes to page faults; read at the first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
