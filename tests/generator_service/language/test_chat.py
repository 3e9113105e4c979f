from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from generator_service.language.chat import Config, LocalChat, SeededNoise
from generator_service.language.pretrained import PretrainedConfig
from protocol.errors import ConfigError, LanguageUnavailable
from tests.generator_service.language.tiny_language import save_blip, save_chat

CONVERSATIONS = [
    [{"role": "system", "content": "a photo " * n}, {"role": "user", "content": "which is asleep"}]
    for n in (1, 7, 4, 2, 9)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("chat"))


def chat(folder: Path, **settings) -> LocalChat:
    return LocalChat(Config(model=str(folder), device="cpu", max_new_tokens=12, **settings))


def by_hand(folder: Path, conversation, temperature: float, seed: int) -> str:
    """The answer by whole forward passes, one token at a time: no batch, no padding, no cache."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    generator, said = torch.Generator().manual_seed(seed), []
    for _ in range(12):
        with torch.no_grad():
            logits = model(tokens).logits[0, -1]
        if temperature:
            uniform = torch.exp(-torch.empty(len(logits)).exponential_(generator=generator))
            logits = logits / temperature - torch.log(-torch.log(uniform))  # Gumbel noise, from its definition
        said.append(int(logits.argmax()))
        if said[-1] == tokenizer.eos_token_id:
            break
        tokens = torch.cat([tokens, torch.tensor([[said[-1]]])], dim=1)
    return tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batched_answers_are_those_of_each_alone(folder: Path, temperature: float):
    answers = chat(folder, temperature=temperature, batch_size=2).complete(CONVERSATIONS, range(5))
    assert answers == [by_hand(folder, asked, temperature, seed) for seed, asked in enumerate(CONVERSATIONS)]


def test_seeds_decide_when_there_is_a_temperature(folder: Path):
    model = chat(folder, temperature=1.0)
    one, same, other = model.complete([CONVERSATIONS[0]] * 3, [1, 1, 2])
    assert one == same != other


def test_noise_makes_samples_of_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rows = 20_000
    drawn = SeededNoise(range(rows), temperature=0.5)(torch.empty(0), logits.expand(rows, 4)).argmax(1)
    expected = rows * torch.softmax(logits / 0.5, 0)
    chi_square = ((torch.bincount(drawn, minlength=4) - expected) ** 2 / expected).sum()
    assert chi_square < 11.3  # 99 % of samples with 3 degrees of freedom


def test_the_global_random_state_is_left_alone(folder: Path):
    before = torch.get_rng_state()
    chat(folder).complete(CONVERSATIONS[:1], [3])
    assert torch.equal(torch.get_rng_state(), before)


def test_once_closed_it_answers_no_more(folder: Path):
    model = chat(folder)
    model.close()
    assert [type(answer) for answer in model.complete(CONVERSATIONS, range(5))] == [LanguageUnavailable] * 5


@pytest.mark.parametrize(
    "system", ["{{ raise_exception('no system role') }}", "{% set unread = true %}"], ids=["refused", "left out"]
)
def test_a_system_turn_that_the_template_does_not_show_goes_into_the_users(tmp_path: Path, system: str):
    without = "{% for turn in messages %}{% if turn['role'] == 'system' %}" + system + "{% else %}<s> "
    without += "{{ turn['role'] }} {{ turn['content'] }} </s> {% endif %}{% endfor %}<s> assistant"
    folder = save_chat(tmp_path, template=without)
    folded = [[{"role": "user", "content": f"{c[0]['content']}\n\n{c[1]['content']}"}] for c in CONVERSATIONS]
    answers = chat(folder, temperature=1.0).complete(CONVERSATIONS, range(5))
    assert answers == [by_hand(folder, asked, 1.0, seed) for seed, asked in enumerate(folded)]


def test_a_template_that_refuses_every_turn_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="takes no user's turn"):
        chat(save_chat(tmp_path, template="{{ raise_exception('no') }}"))


@pytest.mark.parametrize(("room", "asked"), [(2, [5, 2, 2, 1]), (1, [5, 2, 1, 1, 1, 1, 1])])
def test_where_memory_is_short_batches_are_halved(folder: Path, monkeypatch: pytest.MonkeyPatch, room: int, asked):
    model = chat(folder, temperature=1.0)
    sizes = limited(model, monkeypatch, room)
    expected = chat(folder, temperature=1.0).complete(CONVERSATIONS, range(5))
    assert model.complete(CONVERSATIONS, range(5)) == expected
    assert sizes == asked
    model.complete(CONVERSATIONS, range(5))
    assert max(sizes[len(asked) :]) == room  # it need not find out again


def test_without_memory_for_one_question_there_are_no_answers(folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = chat(folder)
    limited(model, monkeypatch, 0)
    assert all("memory" in answer.message for answer in model.complete(CONVERSATIONS, range(5)))


def limited(model: LocalChat, monkeypatch: pytest.MonkeyPatch, room: int) -> list[int]:
    """Give it memory for so many questions. Returns the batches that it tries."""
    sizes, generate = [], model._model.generate

    def short(input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model._model, "generate", short)
    return sizes


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(), "OSError"),
        (ValueError("first\nsecond"), "(first)"),
        (ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece"), "install it (sentencepiece)"),
        (ImportError("\nIt requires the\nprotobuf library"), "install it (It requires the protobuf library)"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, error: Exception, told: str):
    def read(where, **options):
        assert (where, options) == (str(tmp_path), {"revision": None, "trust_remote_code": False})
        raise error

    with pytest.raises(ConfigError) as found:
        PretrainedConfig(model=str(tmp_path)).open(read)
    assert told in found.value.message and "\n" not in found.value.message


def test_models_that_cannot_chat_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="chat template"):
        chat(save_chat(tmp_path / "base", template=None))
    with pytest.raises(ConfigError, match="no folder"):
        chat(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="cannot load"):
        chat(save_blip(tmp_path / "blip"))
