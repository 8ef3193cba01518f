"""A checkpoint directory from nothing: a small Qwen-VL's config, tokenizer, image settings, chat template.

Weights are not part of it; `models.huggingface.create` makes random ones and `save` writes them beside these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# In the order of their ids, from 0: Qwen's special tokens, then the two that Qwen3 keeps whole but shows.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
VISIBLE_TOKENS = ("<think>", "</think>")
# How Qwen's tokenizers cut text before merging: words with their space, single digits, runs of punctuation.
PRETOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = {"qwen3_vl": "Qwen3VL", "qwen2_5_vl": "Qwen2_5_VL"}  # of transformers' classes
# Qwen2.5-VL's template puts this turn first when none is given; Qwen3-VL's puts none.
SYSTEM_TURN = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}"
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' or 'image' in part -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int, chat_template: str):
    """A byte-level BPE tokenizer with Qwen's special tokens, trained on `texts`; at most `vocabulary` entries."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(VISIBLE_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in VISIBLE_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def write_skeleton(directory: str | Path, texts: Iterable[str], architecture: Mapping[str, Any]) -> Path:
    """Writes everything of a checkpoint but its weights; returns the directory.

    Args:
        directory: where to.
        texts: what the tokenizer is trained on.
        architecture: `family` ("qwen3_vl" where it is left out, or "qwen2_5_vl"), `vocabulary`, `tied`, `text` and
            `vision` (keys as in a published config.json), `min_pixels` and `max_pixels` of an image.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    family = architecture.get("family", "qwen3_vl")
    name = NAMES[family]
    chat_template = (SYSTEM_TURN if family == "qwen2_5_vl" else "") + CHAT_TEMPLATE
    tokenizer = train_tokenizer(texts, architecture["vocabulary"], chat_template)
    tokenizer.save_pretrained(str(directory))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    text, vision = dict(architecture["text"]), dict(architecture["vision"])
    decoder = {
        "vocab_size": len(tokenizer), "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"], **text,
    }  # fmt: skip
    if family == "qwen3_vl":
        decoder = {"text_config": {"model_type": "qwen3_vl_text", **decoder}}
        tower = {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3}
    else:  # the published files keep the decoder's keys at the top
        tower = {"hidden_act": "silu", "in_chans": 3, "spatial_patch_size": vision["patch_size"]}
    config = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": family,
        **decoder,
        "vision_config": {"model_type": family, **tower, "out_hidden_size": text["hidden_size"], **vision},
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": architecture["tied"],
    }  # fmt: skip
    images = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": f"{name}Processor",
        "patch_size": vision["patch_size"], "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"], "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    least, most = architecture["min_pixels"], architecture["max_pixels"]
    if family == "qwen3_vl":
        images["size"] = {"shortest_edge": least, "longest_edge": most}
    else:
        images |= {"min_pixels": least, "max_pixels": most}
        images["image_mean"] = [0.48145466, 0.4578275, 0.40821073]
        images["image_std"] = [0.26862954, 0.26130258, 0.27577711]
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    files = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": ends, "pad_token_id": ids["<|endoftext|>"], "do_sample": False},
        "preprocessor_config.json": images,
        "tokenizer_config.json": {**settings, "processor_class": f"{name}Processor"},
        "chat_template.json": {"chat_template": chat_template},
    }
    if family == "qwen3_vl":
        videos = {k: v for k, v in images.items() if k != "image_processor_type"}
        files["video_preprocessor_config.json"] = {**videos, "video_processor_type": "Qwen3VLVideoProcessor"}
    for file, content in files.items():
        (directory / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return directory
