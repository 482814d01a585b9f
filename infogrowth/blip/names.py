"""What BLIP's weights are called: the official names, Hugging Face's, and which names are tied."""

import re

import torch

# Official prefix or pattern -> Hugging Face's. The text parts and heads share their names.
_VISION = [
    (r"visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.(\w+)", r"vision_model.embeddings.patch_embedding.\1"),
    (
        r"visual_encoder\.blocks\.(\d+)\.norm([12])\.(\w+)",
        r"vision_model.encoder.layers.\1.layer_norm\2.\3",
    ),
    (
        r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(\w+)",
        r"vision_model.encoder.layers.\1.self_attn.qkv.\2",
    ),
    (
        r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.(\w+)",
        r"vision_model.encoder.layers.\1.self_attn.projection.\2",
    ),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.(.+)", r"vision_model.encoder.layers.\1.mlp.\2"),
    (r"visual_encoder\.norm\.(\w+)", r"vision_model.post_layernorm.\1"),
]
_FROM_HUGGINGFACE = [
    (r"vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
    (r"vision_model\.embeddings\.patch_embedding\.(\w+)", r"visual_encoder.patch_embed.proj.\1"),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.(\w+)",
        r"visual_encoder.blocks.\1.norm\2.\3",
    ),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.(\w+)",
        r"visual_encoder.blocks.\1.attn.qkv.\2",
    ),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.(\w+)",
        r"visual_encoder.blocks.\1.attn.proj.\2",
    ),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.(.+)", r"visual_encoder.blocks.\1.mlp.\2"),
    (r"vision_model\.post_layernorm\.(\w+)", r"visual_encoder.norm.\1"),
    # BlipModel's own names for what the retrieval class calls otherwise.
    (r"text_model\.(.+)", r"text_encoder.\1"),
    (r"visual_projection\.(\w+)", r"vision_proj.\1"),
    (r"text_projection\.(\w+)", r"text_proj.\1"),
]
_DECODER = "text_decoder.bert."
_OUTPUT = "text_decoder.cls.predictions."


def to_huggingface_name(name: str) -> str:
    """Hugging Face's name of an official one."""
    return _rename(name, _VISION)


def from_huggingface_name(name: str) -> str:
    """The official name of a Hugging Face one."""
    return _rename(name, _FROM_HUGGINGFACE)


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def official_state(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """A state under official names, and the layout it had: ``official`` or ``huggingface``.

    ``BlipModel`` keeps a log scale where BLIP keeps a temperature, and its projections have no
    bias; both are brought over.
    """
    if not any(name.startswith("vision_model.") for name in state):
        return state, "official"
    renamed = {from_huggingface_name(name): tensor for name, tensor in state.items()}
    if "logit_scale" in renamed:
        renamed["temp"] = torch.exp(-renamed.pop("logit_scale").float())
        for side in ("vision", "text"):
            weight = renamed.get(f"{side}_proj.weight")
            if weight is not None:
                renamed.setdefault(f"{side}_proj.bias", weight.new_zeros(len(weight)))
    return renamed, "huggingface"


def other_names(name: str) -> list[str]:
    """Official names under which the same tied parameter may stand in a file."""
    if name == f"{_OUTPUT}decoder.bias":
        return [f"{_OUTPUT}bias"]
    if name == f"{_OUTPUT}bias":
        return [f"{_OUTPUT}decoder.bias"]
    words = "embeddings.word_embeddings.weight"
    if name == f"{_OUTPUT}decoder.weight":
        return [f"{_DECODER}{words}", f"text_encoder.{words}"]
    if name.startswith(_DECODER) and ".attention." not in name:
        own = [f"{_OUTPUT}decoder.weight"] if name == f"{_DECODER}{words}" else []
        return [*own, f"text_encoder.{name[len(_DECODER) :]}"]
    return []


def is_momentum(name: str) -> bool:
    """Whether ``name`` belongs to a momentum encoder."""
    return name.split(".")[0].endswith("_m")


def is_queue(name: str) -> bool:
    """Whether ``name`` is a queue, the pointer of one, or the class vectors: only training's."""
    queues = ("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue")
    return name in (*queues, "class_vectors")


def is_positions(name: str) -> bool:
    """Whether ``name`` is the constant ``position_ids`` of older checkpoints."""
    return name.endswith("embeddings.position_ids")


_PARTS = ("visual_encoder", "text_encoder", "text_decoder", "vision_proj", "text_proj", "itm_head")


def is_known(name: str) -> bool:
    """Whether ``name`` belongs to a part that some BLIP has, needed by this model or not."""
    part = name.split(".")[0].removesuffix("_m")
    pooler = name.startswith("text_encoder.pooler.")
    return not pooler and (part in _PARTS or part == "temp" or is_queue(name))
