"""Starting weights from local copies of what would be downloaded, and without a network."""

import pytest
import timm
import torch
from transformers import BertConfig, BertForMaskedLM

from infogrowth.blip.config import preset
from infogrowth.blip.model import BlipDual
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.pretrained import initialize
from infogrowth.errors import UserError


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A timm ViT with a classifier head, as ImageNet weights come, on 48-pixel images."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=48, depth=3, num_heads=3
    )
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save({"model": model.state_dict()}, path)
    return path, model.state_dict()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT of 193 words with its language head."""
    config = BertConfig(
        vocab_size=193,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    model = BertForMaskedLM(config)
    torch.nn.init.normal_(model.cls.predictions.bias)
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return folder, model.state_dict()


def test_image_and_text_weights_come_from_local_files(golden_config, vit, bert):
    model = BlipPretrain(golden_config, queue_size=4)
    random = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialize(model, vision=vit[0], text=bert[0])
    state, image, text = model.state_dict(), vit[1], bert[1]
    assert torch.equal(
        state["visual_encoder.blocks.2.mlp.fc1.weight"], image["blocks.2.mlp.fc1.weight"]
    )
    assert torch.equal(state["visual_encoder.pos_embed"][:, 0], image["pos_embed"][:, 0])
    assert state["visual_encoder.pos_embed"].shape == (1, 17, 48)  # from 37 positions
    query = "encoder.layer.1.attention.self.query.weight"
    for name in (f"text_encoder.{query}", f"text_decoder.bert.{query}", f"text_encoder_m.{query}"):
        assert torch.equal(state[name], text[f"bert.{query}"])
    words = state["text_encoder.embeddings.word_embeddings.weight"]
    assert torch.equal(words[:193], text["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(words[193:], random["text_encoder.embeddings.word_embeddings.weight"][193:])
    assert words.data_ptr() == state["text_decoder.cls.predictions.decoder.weight"].data_ptr()
    bias = state["text_decoder.cls.predictions.bias"]
    assert torch.equal(bias[:193], text["cls.predictions.bias"]) and not bias[193:].any()
    head = "cls.predictions.transform.dense.weight"
    assert torch.equal(state[f"text_decoder.{head}"], text[head])
    for name in ("text_encoder.encoder.layer.0.crossattention.self.key.weight", "itm_head.weight"):
        assert torch.equal(state[name], random[name])  # BERT has none: random as it was


def test_old_bert_names_of_layer_norms_are_understood(golden_config, bert, tmp_path):
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in bert[1].items()
    }
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    one, two = BlipDual(golden_config), BlipDual(golden_config)
    initialize(one, vision="random", text=bert[0])
    initialize(two, vision="random", text=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_random_changes_nothing(golden_config):
    model, same = BlipDual(golden_config), BlipDual(golden_config)
    initialize(model, vision="random", text="random")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )


def test_weights_of_another_size_are_an_error(golden_config, vit, bert):
    deeper = BlipDual(golden_config.replace(vision_depth=4))
    with pytest.raises(UserError, match=r"missing: visual_encoder\.blocks\.3"):
        initialize(deeper, vision=vit[0], text="random")
    wider = BlipDual(golden_config.replace(text_feedforward=64))
    with pytest.raises(UserError, match="intermediate"):
        initialize(wider, vision="random", text=bert[0])


def test_sizes_without_published_weights_say_so(golden_config):
    with pytest.raises(UserError, match="width 48"):
        initialize(BlipDual(golden_config))


def test_no_network_is_one_clear_sentence(golden_config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = BlipDual(golden_config)
    with pytest.raises(UserError, match=r"timm/deit_base.* hub .*random"):
        initialize(model, vision="deit", text="random")
    with pytest.raises(UserError, match=r"bert-base-uncased.* hub"):
        initialize(model, vision="random", text="bert-base-uncased")


@pytest.mark.parametrize(("size", "file"), [("base", "deit_base"), ("large", "vit_large")])
def test_auto_means_what_blip_starts_from(monkeypatch, size, file):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with torch.device("meta"):
        model = BlipDual(preset(size, image_size=384))
    with pytest.raises(UserError, match=file):
        initialize(model)
