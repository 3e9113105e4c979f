"""Language models of the real classes, tiny and with random weights, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

WORDS = ["a", "photo", "of", "cat", "dog", "sofa", "grass", "asleep", "running", "on", "which", "is", "1.", "2."]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TEMPLATE = (
    "{% for turn in messages %}<s> {{ turn['role'] }} {{ turn['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)
SIZE = 16  # pixels


def tokenizer(words: list[str] = WORDS, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a word."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = template
    return made


def loud(model: PreTrainedModel) -> PreTrainedModel:
    """With weights so large that what it says depends on the picture."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0)
    return model


def save_chat(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A Llama of two layers."""
    torch.manual_seed(0)
    words = tokenizer(template=template)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    torch.manual_seed(0)
    words = tokenizer()
    parts = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = parts | {
        "vocab_size": len(words),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sep_token_id": 2,
        "pad_token_id": 0,
    }
    config = BlipConfig(
        text_config=text | {"encoder_hidden_size": 16},
        vision_config=parts | {"image_size": SIZE, "patch_size": 8, "initializer_range": 0.02},
    )
    loud(BlipForConditionalGeneration(config)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": SIZE, "width": SIZE}), words).save_pretrained(folder)
    return folder


def save_blip2(folder: Path) -> Path:
    torch.manual_seed(0)
    words = tokenizer()
    processor = Blip2Processor(BlipImageProcessor(size={"height": SIZE, "width": SIZE}), words, num_query_tokens=4)
    parts = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = OPTConfig(
        vocab_size=len(words),
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = Blip2Config(
        vision_config=parts | {"image_size": SIZE, "patch_size": 8, "initializer_range": 0.02},
        qformer_config=parts | {"encoder_hidden_size": 16, "vocab_size": 8},
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    loud(Blip2ForConditionalGeneration(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_encoder_decoder(folder: Path) -> Path:
    """A vision transformer with a GPT-2: image processor and tokenizer, and no processor of both."""
    torch.manual_seed(0)
    words = tokenizer(template=None)
    encoder = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=8
    )
    decoder = GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    loud(VisionEncoderDecoderModel(config)).save_pretrained(folder)
    words.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SEEING = (
    "{% for turn in messages %}<s> {{ turn['role'] }} {% for part in turn['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|> {% else %}{{ part['text'] }} {% endif %}{% endfor %}</s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)


def save_vision_chat(folder: Path, template: str | None = SEEING) -> Path:
    """A Qwen2.5-VL of two layers, with patches of four pixels."""
    torch.manual_seed(0)
    words = tokenizer(template=None)
    words.add_special_tokens({"additional_special_tokens": MARKS})
    begin, end, image, video = words.convert_tokens_to_ids(MARKS)
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=begin,
        vision_end_token_id=end,
    )
    loud(Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(folder)
    cut = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    images = Qwen2VLImageProcessor(**cut, size={"shortest_edge": 64, "longest_edge": 1024})
    Qwen2_5_VLProcessor(images, words, Qwen2VLVideoProcessor(**cut), chat_template=template).save_pretrained(folder)
    return folder
