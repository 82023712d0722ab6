"""Parts of the networks that know nothing of CMAE: masks over patches, images as patches, positions, blocks,
the choice of the attention kernel, a batch norm over all ranks. Imports `core` only.
"""
