"""Trace a forward, and prove that the trace is all that it does: refuse what cannot be seen, keep what steered it."""
