"""A configuration measured: time by part, memory by component, and the page that shows them beside the plan.

`report.run` starts a worker for each variant and turn. In it every rank measures a few steps without instruments, then one
under torch's profiler and one with its storages counted; rank 0 writes a `Measurement`. Nothing is trained.
"""
