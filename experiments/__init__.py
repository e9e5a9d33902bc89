"""Running sweeps, storing results, rebuilding tables and figures."""

import os

# Threads that wait by spinning slow every process of a busy machine many times over; read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
