"""Small language models that do what large ones do here: `python -m tests.studies.small_language NPZ --out FOLDER`.

Trains a Llama of a few layers to answer the paper's prompt with numbered versions, and a vision encoder with a text
decoder to describe small photographs; saves both as transformers folders, for `[agent.local]` and `[agent.captioner]`.
Then measures them through the code that a service runs: how many answers hold all versions, how many versions the
template had to make up, and how many captions of held-out pictures are right.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from agent.caption_parser import distinct, parse
from agent.captions import MAX_WORDS, SYSTEM, USER, Perturber, Subject
from agent.planner import PlannerConfig
from generator_service.language import captioner, chat

M = 5
PROMPT = PlannerConfig().captioned_prompt
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "\n"]
TEMPLATE = (
    "{% for turn in messages %}<s> {{ turn['role'] }} {{ turn['content'] }} {% if turn['role'] == 'assistant' %}</s>"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}<s> assistant {% endif %}"
)
COLOURS = ("dark", "bright", "reddish", "greenish", "bluish", "greyish")
ADJECTIVES = ("small", "large", "old", "young", "quiet", "muddy", "pale", "spotted", "tall", "shiny")
VERBS = ("resting", "standing", "waiting", "moving", "turning", "leaning", "hiding", "playing", "posing", "stopping")
PLACES = ("meadow", "harbour", "garden", "street", "barn", "beach", "forest", "bridge", "field", "yard", "lake", "hill")
PREPOSITIONS = ("near", "beside", "behind", "across", "by")


# ---------------------------------------------------------------- the language


def scene(name: str, rng: random.Random, *, held_out: bool) -> str:
    """One of 6,000 scenes of a class; a tenth of them, by their hash, is held out of training."""
    while True:
        place = f"{rng.choice(PREPOSITIONS)} a {rng.choice(PLACES)}"
        text = f"a {rng.choice(ADJECTIVES)} {name} {rng.choice(VERBS)} {place}"
        if (hashlib.sha256(text.encode()).digest()[0] % 10 == 0) == held_out:
            return text


def altered(text: str, rng: random.Random) -> str:
    """The scene with another verb, place or preposition; its adjective and its class stay."""
    words = text.split()
    for index, choices in ((3, VERBS), (4, PREPOSITIONS), (6, PLACES)):
        if rng.random() < 0.6:
            words[index] = rng.choice(choices)
    return " ".join(words)


def conversation(name: str, caption: str) -> list[dict[str, str]]:
    sentence = PROMPT.replace("{class_name}", name).replace("{caption}", caption)
    return [
        {"role": "system", "content": SYSTEM.replace("{m}", str(M))},
        {"role": "user", "content": USER.replace("{sentence}", sentence)},
    ]


def answer(caption: str, rng: random.Random) -> str:
    versions: list[str] = []
    while len(versions) < M:
        versions = list(distinct([*versions, altered(caption, rng)], [caption]))
    return "\n".join(f"{number}. {version}" for number, version in enumerate(versions, start=1))


def tokenizer(texts: Sequence[str], template: str | None) -> PreTrainedTokenizerFast:
    """One token a word, punctuation mark or line break of the texts."""
    spaces = pre_tokenizers.Split(" ", "removed")
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), spaces, pre_tokenizers.Punctuation()])
    words = dict.fromkeys(word for text in texts for word, _ in cut.pre_tokenize_str(text))
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(dict.fromkeys([*SPECIAL, *words]))}, unk_token="<unk>"))
    inner.pre_tokenizer = cut
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = template
    return made


# ---------------------------------------------------------------- training


def train_chat(folder: Path, classes: Sequence[str], steps: int, batch: int = 32) -> None:
    """Next-token prediction of the answers, on captions drawn anew for every step."""
    rng = random.Random(0)
    texts = [*conversation(" ".join(classes), "")]
    corpus = [turn["content"] for turn in texts] + [" ".join((*ADJECTIVES, *VERBS, *PLACES, *PREPOSITIONS, "a"))]
    words = tokenizer([*corpus, "system user assistant", answer(scene(classes[0], rng, held_out=False), rng)], TEMPLATE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        rows, begins = [], []
        for _ in range(batch):
            name = rng.choice(classes)
            caption = scene(name, rng, held_out=False)
            asked = conversation(name, caption)
            whole = [*asked, {"role": "assistant", "content": answer(caption, rng)}]
            rows.append(words.apply_chat_template(whole, return_dict=False))
            begins.append(len(words.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)))
        length = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        wanted = tokens.masked_fill((tokens == 0) | (torch.arange(length) < torch.tensor(begins)[:, None]), -100)
        loss = cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())
        update(optimizer, schedule, loss)
        report("chat", step, steps, loss)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def train_captioner(
    folder: Path, images: np.ndarray, captions: Sequence[str], held_out: int, seconds: float, batch: int = 64
) -> None:
    """Next-token prediction of the captions, each from its picture, mirrored at random; the last ones are held out."""
    words = tokenizer(captions, None)
    parts = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    encoder = ViTConfig(**parts, image_size=32, patch_size=4)
    decoder = GPT2Config(
        vocab_size=len(words), n_embd=96, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    torch.manual_seed(0)
    model = VisionEncoderDecoderModel(config)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    tokens = torch.tensor([[*words(caption).input_ids, 2] for caption in captions])  # all have as many words
    rng = np.random.default_rng(0)
    began = time.monotonic()
    step = 0
    while (spent := time.monotonic() - began) < seconds:
        rows = rng.integers(0, len(images) - held_out, batch)
        mirrored = [images[row, :, ::-1] if rng.random() < 0.5 else images[row] for row in rows]
        pixels = processor([Image.fromarray(image) for image in mirrored], return_tensors="pt")["pixel_values"]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - spent / seconds) * min(1.0, (step + 1) / 100)
        loss = model(pixel_values=pixels, labels=tokens[rows]).loss
        update(optimizer, None, loss)
        report("captioner", step, None, loss)
        step += 1
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    processor.save_pretrained(folder)


def update(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.OneCycleLR | None, loss: torch.Tensor):
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    if schedule is not None:
        schedule.step()


def report(what: str, step: int, steps: int | None, loss: torch.Tensor) -> None:
    if step % 20 == 0:
        print(f"{what}: step {step}{f' of {steps}' if steps else ''}, loss {loss.item():.3f}", flush=True)


# ---------------------------------------------------------------- pictures


def pictures(npz: Path, count: int) -> tuple[np.ndarray, list[str], list[str]]:
    """uint8 [count, 32, 32, 3] in random order, the class name of each, and the names there are."""
    with np.load(npz) as data:  # each look at it reads the file
        jpegs, offsets, labels = data["train_jpeg"], data["train_offsets"], data["train_labels"]
        names = [str(name) for name in data["class_names"]]
    order = np.random.default_rng(0).permutation(len(labels))[:count]
    encoded = [jpegs[offsets[i] : offsets[i + 1]].tobytes() for i in order]
    images = np.stack([np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in encoded])
    return images, [names[labels[i]] for i in order], names


def colour(image: np.ndarray) -> str:
    """The colour word of a picture, from its mean."""
    mean = image.reshape(-1, 3).mean(0)
    if mean.mean() < 80:
        return "dark"
    if mean.mean() > 175:
        return "bright"
    if mean.max() - mean.min() < 18:
        return "greyish"
    return ("reddish", "greenish", "bluish")[int(mean.argmax())]


# ---------------------------------------------------------------- measuring


def measure_chat(folder: Path, classes: Sequence[str], captions: int = 100) -> None:
    rng = random.Random(1)
    names = [rng.choice(classes) for _ in range(captions)]
    subjects = [Subject(name, scene(name, rng, held_out=True)) for name in names]
    model = chat.LocalChat(chat.Config(model=str(folder), batch_size=50, max_new_tokens=100))
    said = model.complete([conversation(*subject) for subject in subjects], range(captions))
    usable = []
    for subject, text in zip(subjects, said, strict=True):
        found = distinct(parse(text), [subject.caption])
        usable.append([version for version in found if len(version.split()) <= MAX_WORDS])
    counts = Counter()
    made = Perturber(model, PROMPT, lambda what, many: counts.update({what: many}))(subjects, M)
    whole = sum(len(versions) == M for versions in usable) / captions
    named = [s.class_name in version for s, versions in zip(subjects, usable, strict=True) for version in versions]
    print(f"answers about scenes held out of training that parse to {M} versions: {whole:.1%}")
    print(f"versions that keep the class: {sum(named) / max(1, len(named)):.1%}")
    print(f"versions that the template made up: {counts['template'] / (captions * M):.1%} ({dict(counts)})")
    for subject in subjects[:2]:
        print(f"  {subject.caption} -> {'; '.join(made[subject].texts)}")


def measure_captioner(folder: Path, images: np.ndarray, captions: Sequence[str]) -> None:
    model = captioner.Captioner(captioner.Config(model=str(folder), batch_size=100, max_new_tokens=8))
    began = time.monotonic()
    said = model.describe(list(images))
    rate = len(images) / (time.monotonic() - began)
    for what, index in (("class", 2), ("colour", 1)):
        right = sum(
            a.split()[index : index + 1] == b.split()[index : index + 1] for a, b in zip(said, captions, strict=True)
        )
        print(f"captions of {len(images)} held-out pictures with the right {what}: {right / len(images):.1%}")
    whole = sum(a == b for a, b in zip(said, captions, strict=True)) / len(images)
    print(f"captions that are right as a whole: {whole:.1%}; {rate:.0f} pictures a second")
    print(f"  {said[0]!r} for {captions[0]!r}, {said[1]!r} for {captions[1]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("npz", type=Path, help="pictures: train_jpeg, train_offsets, train_labels, class_names")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two models")
    parser.add_argument("--chat-steps", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument("--captioner-seconds", type=float, default=150.0, help="(default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=20_500, help="the last 500 are held out (default: %(default)s)")
    options = parser.parse_args()
    images, labels, classes = pictures(options.npz, options.pictures)
    captions = [f"a {colour(image)} {name}" for image, name in zip(images, labels, strict=True)]
    train_chat(options.out / "chat", classes, options.chat_steps)
    measure_chat(options.out / "chat", classes)
    train_captioner(options.out / "captioner", images, captions, 500, options.captioner_seconds)
    measure_captioner(options.out / "captioner", images[-500:], captions[-500:])


if __name__ == "__main__":
    main()
