"""Everything that touches DeepSpeed: processes, engine, optimizer, training step, EMA, checkpoints.

The only folder that imports deepspeed. May import everything below it, but not report.
"""
