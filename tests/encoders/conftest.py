"""Tiny, randomly initialised models in the layouts that people have on disk."""

import string

import pytest
import torch
from PIL import Image, ImageDraw

WORDS = ["a", "the", "red", "green", "blue", "cat", "dog", "boat", "of", "picture", "on", "sea"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session")
def pil_images():
    """Nine different RGB images of odd sizes."""
    drawn = []
    for number in range(9):
        image = Image.new("RGB", (40 + 9 * number, 70 - 5 * number), (25 * number, 90, 200))
        draw = ImageDraw.Draw(image)
        draw.ellipse((3, 3, 20 + number, 25), fill=(250, 20 * number, 10))
        draw.line((0, number * 4, 39, 30), fill=(0, 0, 0), width=3)
        drawn.append(image)
    return drawn


@pytest.fixture(scope="session")
def captions():
    return ["a red cat", "the dog", "Blue boat on the sea!", "picture of a green cat", "cat", "sea",
            "a dog on a boat", "unheard word", "the the the"]  # fmt: skip


def _word_tokenizer(**names):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, "<image>", "[BOS]"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]",
        bos_token="[BOS]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        extra_special_tokens=["<image>"], **names,
    )  # fmt: skip


def _seeded(build):
    """A model whose random weights are spread enough for features to differ between inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [*string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase + "!")]
    words = {w: i for i, w in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=words, merges=[], model_max_length=77).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": 20,
            "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1,
            "pad_token_id": len(words) - 1}  # fmt: skip
    config = CLIPConfig(
        text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )  # fmt: skip
    _seeded(lambda: CLIPModel(config)).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory):
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    folder = tmp_path_factory.mktemp("siglip")
    _word_tokenizer(model_input_names=["input_ids"], model_max_length=16).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    config = SiglipConfig(
        text_config={**tower, "vocab_size": 32, "max_position_embeddings": 16,
                     "projection_size": 32},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
    )  # fmt: skip
    _seeded(lambda: SiglipModel(config)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def git_folder(tmp_path_factory):
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    folder = tmp_path_factory.mktemp("git")
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    config = GitConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8}, **tower, vocab_size=19,
        max_position_embeddings=40, bos_token_id=18, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    _seeded(lambda: GitForCausalLM(config)).save_pretrained(folder)
    GitProcessor(_small_crops(CLIPImageProcessor), _word_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory):
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )  # fmt: skip

    folder = tmp_path_factory.mktemp("llava")
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=32, patch_size=8),
        text_config=LlamaConfig(**tower, vocab_size=19, bos_token_id=18, eos_token_id=3,
                                pad_token_id=0),
        image_token_index=17, vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    _seeded(lambda: LlavaForConditionalGeneration(config)).save_pretrained(folder)
    template = (
        "{% for m in messages %}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %} a"
    )
    LlavaProcessor(
        _small_crops(CLIPImageProcessor), _word_tokenizer(), patch_size=8, chat_template=template,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _small_crops(processor_class):
    return processor_class(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="session")
def blip_models(tmp_path_factory):
    """A random BLIP by transformers' own classes (retrieval, captioning) and its vocab.txt.

    64 channels a head and LayerNorm eps 1e-6 in the vision tower, as in the official checkpoints.
    """
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

    vocabulary = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    words = [*SPECIAL, *WORDS, *string.ascii_lowercase, *("##" + c for c in string.ascii_lowercase)]
    words = list(dict.fromkeys(words))
    vocabulary.write_text("".join(f"{word}\n" for word in words))
    config = BlipConfig(
        vision_config={"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
                       "layer_norm_eps": 1e-6},
        text_config={"vocab_size": len(words) + 2, "hidden_size": 64, "intermediate_size": 128,
                     "num_hidden_layers": 2, "num_attention_heads": 1, "pad_token_id": 0,
                     "max_position_embeddings": 64, "bos_token_id": len(words), "sep_token_id": 3,
                     "eos_token_id": 3, "hidden_dropout_prob": 0.1},
        image_text_hidden_size=16,
    )  # fmt: skip
    retrieval = _seeded(lambda: BlipForImageTextRetrieval(config))
    captioning = _seeded(lambda: BlipForConditionalGeneration(config))
    return retrieval, captioning, vocabulary


@pytest.fixture(scope="session")
def blip_folder(blip_models, tmp_path_factory):
    """The retrieval model as Hugging Face keeps it, like Salesforce/blip-itm-base-coco."""
    folder = tmp_path_factory.mktemp("blip")
    blip_models[0].save_pretrained(folder)
    (folder / "vocab.txt").write_bytes(blip_models[2].read_bytes())
    return folder


@pytest.fixture(scope="session")
def blip_captioning_folder(blip_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip_captioning")
    blip_models[1].save_pretrained(folder)
    (folder / "vocab.txt").write_bytes(blip_models[2].read_bytes())
    return folder


OFFICIAL_NAMES = [
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
    ("vision_model.encoder.layers", "visual_encoder.blocks"),
    ("vision_model.post_layernorm", "visual_encoder.norm"),
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"),
    ("layer_norm", "norm"),
]


@pytest.fixture(scope="session")
def blip_pth(blip_models, tmp_path_factory):
    """The retrieval model as an official checkpoint: old names, under the key `model`, with the
    queues and the temperature of training, and nothing beside it but a vocabulary."""
    state = {}
    for name, tensor in blip_models[0].state_dict().items():
        for ours, official in OFFICIAL_NAMES:
            name = name.replace(ours, official)
        state[name] = tensor.clone()
    state |= {"temp": torch.tensor(0.07), "image_queue": torch.randn(16, 8),
              "queue_ptr": torch.zeros(1, dtype=torch.int64)}  # fmt: skip
    folder = tmp_path_factory.mktemp("official")
    torch.save({"model": state, "epoch": 5}, folder / "model_base_retrieval.pth")
    (folder / "vocab.txt").write_bytes(blip_models[2].read_bytes())
    return folder / "model_base_retrieval.pth"
