"""Time on the target: one clock, the latency of parts, and the choices that follow from it."""
