"""The ground floor: the run file, durations, schedules, who this process is and how processes talk.

Imports nothing else of ours. Only `collectives` needs torch.
"""
