"""What BLIP's weights are called: the official names, Hugging Face's, and which names are tied."""

import re

import torch

# Official name and Hugging Face's; # stands for a block's number, * for the rest. The text parts
# and heads have the same names in both.
_TABLE = [
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.*", "vision_model.embeddings.patch_embedding.*"),
    ("visual_encoder.blocks.#.norm1.*", "vision_model.encoder.layers.#.layer_norm1.*"),
    ("visual_encoder.blocks.#.norm2.*", "vision_model.encoder.layers.#.layer_norm2.*"),
    ("visual_encoder.blocks.#.attn.qkv.*", "vision_model.encoder.layers.#.self_attn.qkv.*"),
    ("visual_encoder.blocks.#.attn.proj.*", "vision_model.encoder.layers.#.self_attn.projection.*"),
    ("visual_encoder.blocks.#.mlp.*", "vision_model.encoder.layers.#.mlp.*"),
    ("visual_encoder.norm.*", "vision_model.post_layernorm.*"),
]
# BlipModel's own names for what the retrieval class calls otherwise.
_READ_ONLY = [
    ("text_encoder.*", "text_model.*"),
    ("vision_proj.*", "visual_projection.*"),
    ("text_proj.*", "text_projection.*"),
]
_DECODER = "text_decoder.bert."
_OUTPUT = "text_decoder.cls.predictions."


def to_huggingface_name(name: str) -> str:
    """Hugging Face's name of an official one."""
    return _rename(name, _TABLE)


def from_huggingface_name(name: str) -> str:
    """The official name of a Hugging Face one."""
    return _rename(name, [(theirs, official) for official, theirs in _TABLE + _READ_ONLY])


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, template in rules:
        groups = re.escape(pattern).replace(r"\#", r"(?P<n>\d+)").replace(r"\*", "(?P<rest>.+)")
        if re.fullmatch(groups, name):
            return re.sub(groups, template.replace("#", r"\g<n>").replace("*", r"\g<rest>"), name)
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
