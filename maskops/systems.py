"""The 53 published systems that the library is to serve, and which of them stand.

A system works when it has a model, maskops/models/<key>.py, and a Works check that passes, python_tests/models/test_<key>.py; the
tests see to it that there is never one without the other, so the model's file is the status.
"""

from importlib.util import find_spec
from typing import NamedTuple

# Their tests show a part of what is to be shown, and say so.
PARTS = {"dmjd"}
FAMILIES = {
    "S": "mask_sampling", "G": "visible_tokens", "A": "masked_attention", "C": "masked_loss", "R": "masked_loss",
    "W": "nm_matmul", "F": "feature_reuse", "V": "sparse_conv",
}  # fmt: skip


class System(NamedTuple):
    """key: the name of its model and test; paper; kind: what it is; uses: letters of FAMILIES, C of classes, R of regression."""

    key: str
    paper: str
    kind: str
    uses: str

    @property
    def ops(self) -> tuple[str, ...]:
        """The op families that it uses, in the order of FAMILIES."""
        return tuple(dict.fromkeys(FAMILIES[letter] for letter in FAMILIES if letter in self.uses))

    @property
    def status(self) -> str:
        """ "works", "in part" or "not yet"."""
        if find_spec(f"maskops.models.{self.key}") is None:
            return "not yet"
        return "in part" if self.key in PARTS else "works"


SYSTEMS = tuple(
    System(*row)
    for row in (
        (
            "hubert_targets",
            "Exploring Prediction Targets in Masked Pre-Training for Speech",
            "speech, masked units",
            "SCG",
        ),
        ("w2v_bert", "W2v-BERT", "speech, contrastive and masked units", "SGC"),
        ("eegdm", "EEGDM", "EEG diffusion", ""),
        ("openbeats", "OpenBEATs", "audio, masked autoencoder", "SGAC"),
        ("lxmert", "LXMERT", "vision and language, two streams", "SACR"),
        ("prop", "PROP", "retrieval pre-training", "SC"),
        ("ssm_dta", "SSM-DTA", "molecules and proteins", "SAC"),
        ("bio_tokenization", "Biomedical LMs are Robust to Sub-optimal Tokenization", "masked text", "SC"),
        ("humanmac", "HumanMAC", "motion diffusion, masked completion", ""),
        ("tokenunify", "TokenUnify", "volumes, next token and masked", "SR"),
        ("mcvd", "MCVD", "video diffusion, masked conditions", "S"),
        ("synth_driving_mae", "Pre-training on Synthetic Driving Data", "polylines, masked autoencoder", "SGAR"),
        ("ernie_gram", "ERNIE-Gram", "text, n-grams", "SAC"),
        ("r_mae_lidar", "Sense Less, Generate More (R-MAE)", "LiDAR, masked autoencoder", "SVGR"),
        ("masksearch", "MaskSearch", "agent, masked spans", "SC"),
        ("meap", "Mask-Enhanced Autoregressive Prediction", "causal LM with masked inputs", "SAC"),
        ("hpm", "Hard Patches Mining", "images, learned hard masks", "SGR"),
        ("r_amt", "Regularized Mask Tuning", "weight masks of a frozen network", "W"),
        ("selfie", "Selfie", "images, contrastive patches", "GSA"),
        ("mto", "Emerging Property of Masked Token (MTO)", "images, mask-token optimisation", "ASR"),
        ("cae", "Context Autoencoder", "images, encoder, regressor, decoder", "SGACR"),
        ("lut", "Learning with Unmasked Tokens", "images, two disjoint views", "SGR"),
        ("electra", "ELECTRA", "text, replaced tokens", "SGC"),
        ("thesis_pretrained", "Making the Most of your Model", "inference with hidden states", "FC"),
        ("layer_masking", "Towards Improved Input Masking for CNNs", "masks inside a CNN", "V"),
        ("simmim", "SimMIM", "images, masked modelling", "SRA"),
        ("cpt_uda", "How Useful is Continued Pre-Training for Generative UDA?", "masked text of two domains", "SCA"),
        ("colormae", "ColorMAE", "images, masks of coloured noise", "SGR"),
        ("uniter", "UNITER", "vision and language, one stream", "SGCRA"),
        ("dmae", "Masked Autoencoders Enable Efficient Knowledge Distillers", "images, distillation", "SGARF"),
        ("maskalign", "Stare at What You See (MaskAlign)", "images, aligned with a teacher", "SGR"),
        ("mask_adapter", "Mask-Adapter", "open-vocabulary segmentation", "C"),
        ("croco", "CroCo", "images, cross-view completion", "SGAR"),
        ("mfm", "Masked Frequency Modeling", "images, masked frequencies", "SR"),
        ("drbert", "Decoder-refined BERT", "masked text", "SAGC"),
        ("spark", "SparK", "images, sparse masked CNN", "VSR"),
        ("maskunet", "Not All Parameters Matter (MaskUNet)", "weight masks of a diffusion U-Net", "WS"),
        ("dmt_jepa", "DMT-JEPA", "images, joint embedding", "SGAR"),
        ("recap", "ReCAP", "masked generation with cached features", "FGAS"),
        ("hybrid_distill", "Hybrid Distillation", "images, two teachers", "SGAR"),
        ("multimae", "MultiMAE", "images, depth and classes", "SGARC"),
        ("nvist", "NViST", "new views from one image", "SGAR"),
        ("maskllm", "MaskLLM", "learned 2:4 masks of a language model", "WSC"),
        ("sdfpt", "Self-Distillation for Further Pre-training", "images and text", "SGRA"),
        ("composable_sft", "Composable Sparse Fine-Tuning", "sparse differences of weights", "WSC"),
        ("dmjd", "Disjoint Masking with Joint Distillation", "images, disjoint views", "SGRV"),
        ("mp3", "Position Prediction as Pretraining", "images, positions", "SAC"),
        ("kalm_v2", "KaLM-Embedding-V2", "text embeddings", "AC"),
        ("cm3", "CM3", "causal LM with moved spans", "SAC"),
        ("dupmae", "DupMAE (RetroMAE v2)", "retrieval, masked autoencoder", "SAC"),
        ("mayor", "Mask is All You Need (Mayor)", "text instances", "R"),
        ("optin", "The Need for Speed (OPTIN)", "one-shot pruning", "WF"),
        ("starbucks", "Starbucks", "text embeddings of many sizes", "SCA"),
    )
)


def table() -> str:
    """All systems with their ops and status, as text."""
    rows = [("", "system", "status", "ops", "paper")]
    rows += [(str(i + 1), s.key, s.status, ", ".join(s.ops) or "-", s.paper) for i, s in enumerate(SYSTEMS)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    ]
    works = sum(s.status == "works" for s in SYSTEMS)
    parts = sum(s.status == "in part" for s in SYSTEMS)
    return "\n".join([*lines, f"{works} of {len(SYSTEMS)} work, {parts} in part"])
