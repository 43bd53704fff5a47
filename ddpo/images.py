"""Grids of images."""

from PIL import Image, ImageDraw, ImageFont

SMALLEST = 192  # pixels; narrower images are enlarged, by a whole factor
LINES = 2  # of a label; what is longer ends in an ellipsis


def grid_columns(count):
    """How many of `count` images a grid has in a row, if it is not told."""
    return min(count, max(1, round(count**0.5 * 1.3)))


def image_grid(images, labels=None, columns=0, heads=()):
    """One image of many, `columns` to a row (0: nearly square), each with its label under it, and a head over each
    column."""
    columns = columns or grid_columns(len(images))
    width, height = images[0].size
    zoom = -(-SMALLEST // width)
    width, height = width * zoom, height * zoom
    font = ImageFont.load_default(max(13, width // 16))
    line = sum(font.getmetrics())
    below, above = LINES * line if labels else 0, line if heads else 0
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + 2), above + rows * (height + 2 + below)), "white")
    for column, head in enumerate(heads):
        ImageDraw.Draw(grid).text((column * (width + 2) + 1, 0), head, "black", font)
    for i, image in enumerate(images):
        left, top = i % columns * (width + 2), above + i // columns * (height + 2 + below)
        grid.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        if labels and labels[i]:
            free = i + 1  # a label may run on under the images of its row that have none
            while free % columns and not any(labels[free : free + 1]) and free < len(images):
                free += 1
            text = wrap(labels[i], (free - i) * (width + 2) - 4, font)
            ImageDraw.Draw(grid).multiline_text((left + 1, top + height), text, "black", font, spacing=0)
    return grid


def wrap(text, width, font):
    """The text in at most LINES lines of `width` pixels; cut with an ellipsis if it is longer."""
    lines, words = [""], text.split()
    for i, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) < LINES and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = " ".join([longer, *words[i + 1 :]])  # cut below
            break
    for i, long in enumerate(lines):
        while font.getlength(lines[i]) > width and long:
            long = long[:-1]
            lines[i] = long.rstrip() + "..."
    return "\n".join(lines)
