"""Kernels for accelerators; one file a compiler, bodies apart from launches."""
