"""Tiny models and texts, as for the other tests of the command line."""

from tests.experiments.conftest import shared, workspace

__all__ = ["shared", "workspace"]
