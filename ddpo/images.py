"""Grids of pictures."""

from PIL import Image, ImageDraw


def grid_columns(count):
    """How many of `count` pictures a grid has in a row, if it is not told."""
    return min(count, max(1, round(count**0.5 * 1.3)))


def image_grid(images, labels=None, columns=0, heads=()):
    """One picture of many, `columns` to a row (0: nearly square), each with its label under it, and a head over each
    column."""
    columns = columns or grid_columns(len(images))
    width, height = images[0].size
    zoom = max(1, 96 // width)  # a 64-pixel picture is too small for a label and for most eyes
    width, height = width * zoom, height * zoom
    line, above = 13 if labels else 0, 13 if heads else 0
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + 2), above + rows * (height + 2 + line)), "white")
    for column, head in enumerate(heads):
        ImageDraw.Draw(grid).text((column * (width + 2) + 1, 0), head, fill="black")
    for i, image in enumerate(images):
        left, top = i % columns * (width + 2), above + i // columns * (height + 2 + line)
        grid.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        if labels:
            room = width // 6 if any(labels[i + 1 : i + 2]) else None  # a label may run on under pictures without one
            ImageDraw.Draw(grid).text((left + 1, top + height), labels[i][:room], fill="black")
    return grid
