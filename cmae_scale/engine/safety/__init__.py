"""What may happen to a run of many processes, and how all ranks come to one decision about it."""
