"""The benchmark of learning: what it teaches and how it judges, and its reduced form, a LoRA and a word."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from sd_train.demo.rows import read_picture
from sd_train.drawing import draw_pixels
from sd_train.families.tokenizer import load_clip_tokenizer
from sd_train.prompts import Prompt
from tests.models import fresh_tiny
from tests.runs import SOURCES
from tools.learn import REPORTED, TUNED, Concept, main

# isort: split
# What lies beside learn.py is found from here on.
from learn_concepts import ASKED, SHOWN, TRAINED, reg_prompts
from learn_scores import ASKED_COUNT, CLASS_COUNT, GUIDANCE, SAMPLER, STEPS, draw_captions, old_scenes
from shapes_judge import look, right
from shapes_world import HELD_OUT_PAIRS, PIXELS, caption, draw, examination, training_scenes

EVERY = [*REPORTED, *TUNED]
LEAST_RIGHT = 0.99


def named(concept: Concept) -> str:
    return concept.name


@pytest.mark.parametrize("concept", EVERY, ids=named)
def test_the_judge_sees_a_drawn_concept_and_all_else_that_its_caption_says(concept: Concept) -> None:
    scenes = [*concept.scenes(SHOWN, 40, 11), *concept.scenes(ASKED, 24, 12)]
    pictures = [draw(scene, seed) for seed, scene in enumerate(scenes)]
    assert np.mean([concept.shows(look(picture)) for picture in pictures]) >= LEAST_RIGHT
    assert np.mean([right(*pair) for pair in zip(scenes, pictures, strict=True)]) >= LEAST_RIGHT


@pytest.mark.parametrize("concept", EVERY, ids=named)
def test_the_judge_sees_no_concept_in_a_drawn_class_nor_in_the_base_world(concept: Concept) -> None:
    scenes = [*concept.plain_asked(CLASS_COUNT), *training_scenes(40, 3, frozenset())]
    assert not any(concept.shows(look(draw(scene, seed))) for seed, scene in enumerate(scenes))


def test_the_judge_is_right_about_the_base_world() -> None:
    scenes = [*training_scenes(100, 5, frozenset()), *examination()[::4]]
    pictures = [draw(scene, seed) for seed, scene in enumerate(scenes)]
    assert np.mean([right(*pair) for pair in zip(scenes, pictures, strict=True)]) >= LEAST_RIGHT
    # Against the next scene's caption it is nearly always wrong.
    assert np.mean([right(*pair) for pair in zip(scenes[1:], pictures, strict=False)]) < 0.1


def test_no_caption_of_the_examination_is_trained_on_and_no_held_out_pair() -> None:
    without = frozenset(caption(scene) for scene in examination())
    scenes = training_scenes(3000, 1, without)
    assert len(without) == 500
    assert not without & {caption(scene) for scene in scenes}
    assert not HELD_OUT_PAIRS & {(thing.shape, thing.colour) for scene in scenes for thing in scene.things}
    asked = [{(thing.shape, thing.colour) for thing in scene.things} & HELD_OUT_PAIRS for scene in examination()]
    assert not any(asked[:350])
    assert all(asked[350:])


@pytest.mark.parametrize("concept", EVERY, ids=named)
def test_what_is_asked_for_stood_in_no_training_picture(concept: Concept) -> None:
    trained, asked = concept.trained(), concept.asked(ASKED_COUNT)
    assert len(set(map(concept.caption, trained))) == TRAINED
    assert not {scene.background for scene in trained} & {scene.background for scene in asked}
    things = [[thing for scene in scenes for thing in scene.things] for scenes in (trained, asked)]
    if concept.kind != "glyph":
        assert not {thing.shape for thing in things[0]} & {thing.shape for thing in things[1]}
    # Of a pairing or a style the concept itself is the colour.
    if concept.kind == "glyph":
        assert not {thing.colour for thing in things[0]} & {thing.colour for thing in things[1]}


def test_forgetting_is_judged_by_no_caption_of_a_regularisation_image() -> None:
    old = {caption(scene) for scene in old_scenes()}
    assert not any(old & {*reg_prompts(concept)} for concept in EVERY)


def test_captions_name_the_concept_with_its_word_and_the_class_without() -> None:
    for concept in EVERY:
        for scene in concept.asked(8):
            said = concept.caption(scene)
            assert said.split().count(concept.word) + said.split().count(f"{concept.word},") == 1
            assert concept.word not in caption(concept.plain(scene))
            known = [*concept.pair, concept.name] if concept.kind != "style" else [concept.name]
            assert not set(known) & set(said.replace(f" on a {scene.background} background", "").split())


def test_invented_words_are_no_words_of_clips_vocabulary_and_differ() -> None:
    tokenizer = load_clip_tokenizer("<|endoftext|>")
    words = [concept.word for concept in EVERY]
    assert len(set(words)) == len(words)
    assert all(len(tokenizer.tokenize(word)) > 1 for word in words)


def test_captions_drawn_together_are_drawn_as_alone() -> None:
    family = fresh_tiny()
    captions = [caption(scene) for scene in old_scenes()[:3]]
    together = draw_captions(family, captions)
    for seed, text in enumerate(captions):
        prompt = Prompt(text, width=PIXELS, height=PIXELS, steps=STEPS, scale=GUIDANCE)
        assert float((together[seed] - draw_pixels(family, prompt, SAMPLER, seed)).abs().max()) < 1e-3
    assert float((together[0] - together[1]).abs().mean()) > 0.01


def test_the_demonstration_shows_the_first_concept() -> None:
    demo, concept = SOURCES / "sd_train" / "demo" / "zorbik", REPORTED[0]
    assert len(list(demo.glob("*.png"))) == TRAINED
    for number, (scene, picture) in enumerate(zip(concept.trained(), concept.training_pictures(), strict=True)):
        assert np.array_equal(read_picture(demo / f"{number}.png"), picture)
        assert (demo / f"{number}.txt").read_text(encoding="utf-8").strip() == concept.caption(scene)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reduced form of the benchmark: what `results.json` says of a LoRA and of textual inversion."""
    folder = tmp_path_factory.mktemp("learn")
    chosen = "--methods lora;ti --concepts crescent --seeds 1 --workers 1"
    assert main([*chosen.split(), "--output_dir", str(folder)]) == 0
    results = json.loads((folder / "results.json").read_text())
    return {run["method"]: run for run in results["runs"]} | {"before": results["before"][0], "folder": folder}


def test_a_lora_teaches_a_shape_in_other_colours_and_keeps_the_rest(learned: dict[str, Any]) -> None:
    before, lora = learned["before"]["scores"], learned["lora"]
    assert before["concept"] <= 0.1
    assert before["old"] >= 0.85
    # Measured: 0.83 and 0.09.
    assert lora["scores"]["concept"] >= 0.6
    assert lora["drift"] <= 0.25


def test_a_new_word_touches_nothing_but_its_token(learned: dict[str, Any]) -> None:
    before, word = learned["before"], learned["ti"]
    assert list(word["tensors"]) == ["emb_params"]
    assert word["scores"]["old_pixels"] == before["scores"]["old_pixels"]
    assert word["scores"]["class_drawn"] == before["scores"]["class_drawn"]
    runs = learned["folder"] / "runs"
    drawn = [np.load(runs / f"{name}-zorbik-0" / "asked.npy") for name in ("base_model", "ti")]
    assert (drawn[0] != drawn[1]).any(axis=(1, 2, 3)).all()


def test_the_grid_shows_every_method(learned: dict[str, Any]) -> None:
    assert (learned["folder"] / "grid.png").stat().st_size > 10_000
