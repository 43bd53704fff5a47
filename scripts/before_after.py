"""Puts the first and the last picture grid of runs side by side: the same prompts and noise before and after training.

    python -m scripts.before_after runs/A runs/B --output before_after.png

A row per run.
"""

import argparse
import os
import sys

from PIL import Image, ImageDraw, ImageFont


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--labels", nargs="*", default=[], help="a title per run; default: its folder's name")
    parser.add_argument("--output", default="before_after.png")
    args = parser.parse_args()
    rows = []
    for run in args.runs:
        folder = os.path.join(run, "images")
        grids = sorted(f for f in os.listdir(folder) if f.startswith("epoch_")) if os.path.isdir(folder) else []
        if len(grids) < 2:
            sys.exit(f"error: {run} does not hold two picture grids")
        rows.append([Image.open(os.path.join(folder, name)) for name in (grids[0], grids[-1])])
    gap, title = 24, 26
    width = max(a.width + gap + b.width for a, b in rows)
    sheet = Image.new("RGB", (width, sum(a.height + title for a, _ in rows)), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(16), 0
    for i, (run, (before, after)) in enumerate(zip(args.runs, rows)):
        label = args.labels[i] if i < len(args.labels) else os.path.basename(os.path.normpath(run))
        draw.text((2, top + 2), f"{label}: before", fill="black", font=font)
        draw.text((before.width + gap + 2, top + 2), "after", fill="black", font=font)
        sheet.paste(before, (0, top + title))
        sheet.paste(after, (before.width + gap, top + title))
        top += before.height + title
    sheet.save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
