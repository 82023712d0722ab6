"""A pre-training run of a few seconds."""

SMALL = [
    "cmae.model.embed_dim=24",
    "cmae.model.depth=2",
    "cmae.model.num_heads=2",
    "cmae.model.pixel_decoder.depth=1",
    "cmae.model.pixel_decoder.embed_dim=24",
    "cmae.model.feature_decoder.embed_dim=24",
    "cmae.monitor.log_every=2",
    "cmae.monitor.pictures=2",
    # named, because runs are compared to the bit
    "torch_autocast.enabled=false",
    "cmae.model.attention=flash",
]
