"""Benchmarks: how long what we do takes beside the published way of doing it, in the same run."""
