"""Trials that claims are measured by: the loader beside others, batches of every world, memory beside its
prediction, runs that are killed. Imported by bench and tests alone; may import everything below.
"""
