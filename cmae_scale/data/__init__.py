"""From shards, wherever they lie, to batches of uint8 master images in an order that is pure arithmetic.

Imports core only, and is the only folder of the package that may import webdataset. Import from its files:
index, plan, tar and decode need no torch, and making shards should not wait for it to load.
"""
