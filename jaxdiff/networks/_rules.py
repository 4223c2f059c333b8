"""How single layers of the networks are split over the tensor axis of a mesh."""

TENSOR_RULES = (
    # Attention by heads: queries, keys and values by column, the output by row.
    (r"attention/[qkv]/kernel$", (None, "tensor")),
    (r"attention/[qkv]/bias$", ("tensor",)),
    (r"attention/out/kernel$", ("tensor", None)),
    # Two-layer parts by their inner width.
    (r"blocks/(\d+/)?first/kernel$", (None, "tensor")),
    (r"blocks/(\d+/)?first/bias$", ("tensor",)),
    (r"blocks/(\d+/)?second/kernel$", ("tensor", None)),
    # Residual blocks of a UNet by the channels between their two convolutions.
    (r"block/conv1/kernel$", (None, None, None, "tensor")),
    (r"block/conv1/bias$", ("tensor",)),
    (r"block/norm2/(scale|bias)$", ("tensor",)),
    (r"block/conv2/kernel$", (None, None, "tensor", None)),
)
"""Rules for `parallel.specs`: one sum over the tensor axis after attention, and one after each
two-layer part.

Reference: Shoeybi, Patwary, Puri, LeGresley, Casper, Catanzaro, "Megatron-LM: Training
Multi-Billion Parameter Language Models Using Model Parallelism", 2019, arXiv 1909.08053, section 3.
"""
