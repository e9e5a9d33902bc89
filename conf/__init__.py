"""Hydra configurations (YAML only)."""
