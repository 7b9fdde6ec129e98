"""The demo's tokenizer: byte-level BPE learned from generated captions, so that any UTF-8 prompt still encodes."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from diffsparse.eval.synthetic_video import random_scene


def build_tokenizer(seed: int = 0, num_captions: int = 2000) -> PreTrainedTokenizerFast:
    """A tokenizer that takes one token for most caption words; 0, 1, 2 are pad, eos and unk as in UMT5."""
    generator = torch.Generator().manual_seed(seed)
    captions = [random_scene(generator).caption for _ in range(num_captions)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )
