"""The ground floor: files, locks, errors, who this process is, how processes talk, what people are told.

Imports nothing else of ours. Only `collectives` needs torch.
"""
