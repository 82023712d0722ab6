"""From shards on disk to batches of uint8 master images on the device, in an order that is pure arithmetic.

Imports core only, and is the only folder of the package that may import webdataset. Everything is imported
from its own module (`cmae_scale.data.stream` and so on): `index`, `plan`, `tar` and `decode` need no torch,
and sharding a folder of images should not wait for it.
"""
