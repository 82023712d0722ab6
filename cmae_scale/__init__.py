"""Pre-training of vision encoders with contrastive masked autoencoders, at scale.

Files at this level are commands; folders are libraries; imports go down only (README, "How the tree reads").
"""
