"""What a run file may say, and what follows from it: settings, batches, durations, schedules, precision.

Imports core alone, and no torch: a typo is told before anything large is loaded.
"""
