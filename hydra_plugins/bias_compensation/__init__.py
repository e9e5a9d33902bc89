"""Hydra looks for plugins in this namespace only; see :mod:`hydra_plugins.bias_compensation.launchers`."""
