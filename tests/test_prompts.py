import pytest
from transformers import CLIPTokenizer

from ddpo import prompts
from ddpo.errors import InputError


def texts(name):
    return [prompt for prompt, _ in prompts.get_prompts(name)]


SIZES = {"imagenet_animals": 398, "common_animals": 45, "animal_activities": 135, "counting": 315}  # the paper's


@pytest.mark.parametrize("name, size", (SIZES | {"geneval": 440, "ocr": 640}).items())
def test_sets_have_their_size_and_no_repeats(name, size):
    pairs = prompts.get_prompts(name)
    assert len(pairs) == len({prompt for prompt, _ in pairs}) == size
    assert all(prompt == prompt.strip() and isinstance(metadata, dict) for prompt, metadata in pairs)


def test_imagenet_animals_are_in_class_order():
    animals = texts("imagenet_animals")
    known = {0: "a tench", 1: "a goldfish", 2: "a great white shark", 134: "a crane", 151: "a chihuahua"}
    known |= {281: "a tabby", 310: "an ant", 388: "a giant panda", 397: "a puffer"}
    assert {index: animals[index] for index in known} == known
    assert all(animal == animal.lower() for animal in animals)


@pytest.mark.parametrize("name", ["imagenet_animals", "common_animals", "animal_activities"])
def test_articles(name):
    for prompt in texts(name):
        article, word = prompt.split()[:2]
        vowel_sound = word[0] in "aeiou" and not word.startswith("eu")  # "a european gallinule"
        assert article == ("an" if vowel_sound else "a"), prompt


def test_activities_name_their_animal():
    assert ("an ant riding a bike", {"animal": "ant", "activity": "riding a bike"}) in prompts.animal_activities()
    for prompt, metadata in prompts.animal_activities():
        assert prompt.endswith(f" {metadata['animal']} {metadata['activity']}")


def test_counting():
    pairs = dict(prompts.counting())
    assert pairs["three cats"] == {
        "questions": ["How many cats are there in this image?", "What animal is in this image?"],
        "answers": ["three", "cat"],
    }
    numbers = {metadata["answers"][0] for metadata in pairs.values()}
    assert numbers == {"two", "three", "four", "five", "six", "seven", "eight"}
    for plural in "sheep deer fish mice geese wolves foxes butterflies flies monkeys turkeys".split():
        assert f"eight {plural}" in pairs


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_file(tmp_path, encoding):
    path = tmp_path / "mine.txt"
    path.write_text("a café\n\n   \n  a green dog \n", encoding=encoding)
    assert prompts.get_prompts(str(path)) == [("a café", {}), ("a green dog", {})]


def test_file_that_gives_no_prompts_is_named(tmp_path):
    blank, binary = tmp_path / "blank.txt", tmp_path / "binary.txt"
    blank.write_text("\n  \n")
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (blank, binary, tmp_path / "missing.txt", tmp_path):
        with pytest.raises(InputError) as error:
            prompts.get_prompts(str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_unknown_name_lists_the_sets_and_the_nearest():
    with pytest.raises(InputError, match="Did you mean common_animals") as error:
        prompts.get_prompts("comon_animal")
    assert "\n" not in str(error.value)
    assert all(name in str(error.value) for name in prompts.PROMPT_SETS)


def test_too_long_prompt_is_named():
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=8)
    fits = "a b a b a b"  # eight tokens with the start and the end
    prompts.check_length([fits], tokenizer)
    with pytest.raises(InputError, match="'b a b a b a b' has 9 tokens.* takes 8;.*2 of 3 prompts"):
        prompts.check_length([fits, "b a b a b a b", "a a a a a a a a"], tokenizer)


def test_json_lines_carry_metadata(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "two cats", "answers": ["two"]}\n\n{"prompt": "a dog"}\n')
    assert prompts.get_prompts(str(path)) == [("two cats", {"answers": ["two"]}), ("a dog", {})]


@pytest.mark.parametrize(
    "line", ["a dog", '{"text": "a dog"}', '["a dog"]', '{"prompt": 3}', '{"prompt": " "}', '{"pro']
)
def test_a_bad_json_line_is_named(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cat"}\n' + line + "\n")
    with pytest.raises(InputError, match=r"prompts.jsonl, line 2: a line must be a JSON object"):
        prompts.get_prompts(str(path))


def test_json_lines_under_a_text_files_name_are_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('{"prompt": "a cat"}\n')
    with pytest.raises(InputError, match="looks like JSON lines: let its name end in .jsonl"):
        prompts.get_prompts(str(path))
