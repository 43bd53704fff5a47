"""The reward `ocr`: whether the text that a prompt quotes can be read in the image.

Flow-GRPO's (Liu et al., arXiv 2505.05470): 1 - min(d, n) / n, where n is the length of the quoted text and d its edit
distance from what is read, both in lower case and without spaces. As in the authors' code, though not in the paper's
formula, d is 0 where the quoted text is part of what is read: other writing in the image then costs nothing.

Deviations: rapidocr, whose package holds its models (PaddleOCR's PP-OCRv6 small, in ONNX) and runs without Paddle, in
place of PaddleOCR, which downloads them. An image that cannot be scored ends the run; theirs scores 0.
"""

import os
import re

import numpy as np
import torch

from ddpo.errors import InputError, shorten
from ddpo.hardware import cpu_cores


def wanted_text(prompt, metadata):
    """The text that an image shall show, in lower case without spaces: metadata["text"], else what the prompt has in
    double quotes, else ""."""
    quoted = re.search(r'"(.*?)"|“(.*?)”', prompt, re.DOTALL)
    text = metadata.get("text") or (quoted[1] or quoted[2] if quoted else "")
    return plain(text or "")


def plain(text):
    """A text in lower case, without white space."""
    return "".join(str(text).lower().split())


def edit_distance(a, b):
    """The least number of insertions, deletions and substitutions of one character that make b of a (Levenshtein)."""
    row = list(range(len(b) + 1))  # of a's empty beginning from each beginning of b
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def legibility(read, wanted):
    """1 - min(d, n) / n, see above, of two texts as `plain` gives them; wanted is not empty."""
    distance = 0 if wanted in read else edit_distance(read, wanted)
    return 1 - min(distance, len(wanted)) / len(wanted)


def load_reader(threads):
    """A function read(image) -> the text in a PIL image of any size, line by line, "" for none.

    threads: CPU threads that it may use; it does not use a GPU.
    """
    try:
        import onnxruntime  # noqa: F401 (which rapidocr runs its models with)
        from rapidocr import RapidOCR
    except ImportError as error:
        raise InputError(f"it needs packages of its own ({error}): pip install rapidocr onnxruntime") from error
    parameters = {"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": threads}
    # As Flow-GRPO runs PaddleOCR: no look for text upside down, and no image enlarged, which takes twice the time.
    parameters |= {"Global.use_cls": False, "Det.limit_type": "max", "Det.limit_side_len": 960}
    engine = RapidOCR(params=parameters)

    def read(image):
        pixels = np.asarray(image.convert("RGB"))[:, :, ::-1]  # BGR, as OpenCV has it
        return " ".join(engine(np.ascontiguousarray(pixels)).txts or ())

    return read


def load_ocr(model, device, options):
    """Flow-GRPO's reward for text in pictures: 1 where it is read without an error, 0 where nothing of it is."""
    if model:
        raise InputError("it takes no model")
    on_cpu = torch.device(device).type == "cpu"  # where its cores are sampling's, shared out by config.threads
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    read = load_reader(torch.get_num_threads() if on_cpu else max(1, cpu_cores() // shared))

    def check(prompt_set):
        for prompt, metadata in prompt_set:
            if not wanted_text(prompt, metadata):
                raise InputError(
                    'it needs prompts that quote the text to be drawn, like the set ocr: A sign that says "Open"; '
                    f"not {shorten(prompt)}"
                )

    def ocr(images, prompts, metadata):
        """1 - min(edit distance, length) / length of the quoted text; ocr_exact: whether that is 1."""
        check(list(zip(prompts, metadata)))
        wanted = [wanted_text(prompt, m) for prompt, m in zip(prompts, metadata)]
        values = np.array([legibility(plain(read(i)), w) for i, w in zip(images, wanted)], dtype=np.float32)
        return values, {"ocr_exact": values == 1}

    ocr.check = check
    return ocr
