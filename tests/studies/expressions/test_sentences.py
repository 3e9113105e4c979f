"""Sentences and clips belong together, and the text encoder's words are those of prompts."""

import numpy as np

from tests.expressions.portrait import UNITS
from tests.expressions.world import EMOTIONS, people
from tests.studies.expressions import film, sentences


def test_a_clip_acts_out_what_its_sentences_tell():
    told = list(sentences.told_clips(people("told", 0, 4), 4, 0, size=16, frames=2))
    assert [clip.emotion for clip, _ in told] == [emotion for emotion in EMOTIONS for _ in range(4)]
    for clip, texts in told:
        assert len(texts) == sentences.TOLD and all(clip.emotion in text for text in texts)
        if clip.units[-1, UNITS.index("AU26")] > 0.5:
            assert any("jaw" in text or "mouth" in text for text in texts)


def test_what_cannot_be_drawn_is_drawn_as_what_comes_nearest():
    assert sentences.drawable({"AU24": 0.3, "AU23": 0.6, "AU51": 0.4, "AU45": 0.5}) == {"AU23": 0.6}


def test_words_of_prompts_are_one_token_each():
    tokens = film._tokenizer()
    assert all(len(tokens(word).input_ids) == 3 for word in sentences.words())
    texts = [text for _, texts in sentences.told_clips(people("told", 1, 4), 4, 1, size=16, frames=2) for text in texts]
    lengths = [len(tokens(text).input_ids) for text in texts]
    assert np.mean([length <= film.TOKENS for length in lengths]) > 0.95
