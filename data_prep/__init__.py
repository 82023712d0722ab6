"""Commands that turn what people have into shards, and check them.

Imports core and the parts of data that need no torch.
"""
