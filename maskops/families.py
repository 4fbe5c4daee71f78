"""The registry of op families: adding a family is adding its files and one line here."""

FAMILIES = (
    "visible_tokens",
    "mask_sampling",
    "masked_loss",
    "nm_matmul",
    "masked_attention",
    "sparse_conv",
    "feature_reuse",
)
