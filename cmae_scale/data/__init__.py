"""From shards, wherever they lie, to batches of uint8 master images in an order that is pure arithmetic.

Shards are WebDataset's tars, read by a strict reader of ours (`tar`); `webdataset_source` gives our order of
samples to webdataset's own pipelines. Imports config and core only. Import from its files: index, plan, tar
and decode need no torch, and making shards should not wait for it to load.
"""
