"""Texts and images: calibration, selection and test samples."""
