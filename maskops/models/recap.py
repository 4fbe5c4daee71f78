"""ReCAP: masked generation of which some steps compute only the tokens that they are about to decode.

Liu et al., 2025 (arXiv 2505.19089). Training-free, for any MaskedModel, as MaskGIT and MAGE are.
"""

from __future__ import annotations

from dataclasses import dataclass

from maskops.generation import MaskedGenerator, MaskedModel, ReCAP, token_evaluations
from maskops.ops.feature_reuse import mask_schedule


@dataclass(frozen=True)
class Setting:
    """Steps of the base model, how many full ones come first, and local steps per group after them."""

    steps: int
    pre_full: int
    local_steps: int = 1


# Published scripts of MaskGIT-r + ReCAP, named full + local.
SETTINGS = {
    "22+10": Setting(32, 12), "17+7": Setting(24, 10), "15+5": Setting(20, 10), "12+4": Setting(16, 8), "8+8": Setting(16, 0),
}  # fmt: skip


def recap(
    model: MaskedModel, setting: str | Setting = "8+8", *, schedule: str = "pow", temperature: float = 5.5,
    sample_temperature: float = 1.0, guidance: float = 0.0,
) -> MaskedGenerator:  # fmt: skip
    """A generator over `model` with a published setting, or one of your own.

    Args:
        model: a MaskedModel.
        setting: a name in SETTINGS, or a Setting.
        schedule: of the base model. "pow" is that of MaskGIT-r, 1 - r^2.5 with at least one token a step; others as mask_schedule.
        temperature, sample_temperature, guidance: see MaskedGenerator.

    Raises:
        ValueError: a setting that is not known, more steps than tokens.

    Example:
        >>> from maskops.models.maskgit import MaskGIT, MaskGITConfig
        >>> generator = recap(MaskGIT(MaskGITConfig(vocab=8, dim=32, depth=1, heads=2)), "22+10")
        >>> print(generator.explain())
        32 steps: 22 full and 10 local; 5912 of 8224 token evaluations of 32 full steps (72%)
    """
    if isinstance(setting, str):
        if setting not in SETTINGS:
            raise ValueError(f"recap: setting must be one of {sorted(SETTINGS)} or a Setting, got {setting!r}")
        setting = SETTINGS[setting]
    counts = mask_schedule(schedule, setting.steps, model.num_tokens, at_least_one=schedule == "pow")
    return MaskedGenerator(
        model, counts, ReCAP(setting.pre_full, setting.local_steps), temperature=temperature,
        sample_temperature=sample_temperature, guidance=guidance,
    )  # fmt: skip


def saving(setting: str | Setting, num_tokens: int, prefix: int = 1, schedule: str = "pow") -> float:
    """Token evaluations of a setting over those of as many full steps."""
    setting = SETTINGS[setting] if isinstance(setting, str) else setting
    counts = mask_schedule(schedule, setting.steps, num_tokens, at_least_one=schedule == "pow")
    own, full = token_evaluations(ReCAP(setting.pre_full, setting.local_steps), counts, prefix)
    return own / full
