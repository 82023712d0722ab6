"""Files of tensors under other projects' names: MAE, ConvMAE, official CMAE, timm, Hugging Face.
Names, sizes, and the checks between them; the modules themselves are built elsewhere in `models`.
"""
