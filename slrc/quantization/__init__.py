"""Scales for an integer program: found on calibration data, chosen, trained, and proven in what was emitted."""
