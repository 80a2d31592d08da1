"""What runs on the other side of an engine: programs that are started, never imported.

Nothing in here imports eqrl at its top, so a worker runs in an environment that has none of it.
"""
