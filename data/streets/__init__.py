"""Procedural street scenes with exact labels, in the 19 classes of Cityscapes: pictures without a download.

world.py decides what stands where, sprites.py how things look (drawn with canvas.py), scene.py projects and lights
one frame, write.py stores scenes in the layouts of real data sets.
"""

from pathlib import Path

from data.streets.scene import draw_clip, draw_scene
from data.streets.write import write_bdd100k, write_cityscapes

__all__ = ["draw_clip", "draw_scene", "drawing", "write_bdd100k", "write_cityscapes"]


def drawing() -> str:
    """The text of the program that draws: where it differs, the same seed is another data set."""
    folder = Path(__file__).parent
    return "\n".join((folder / f"{name}.py").read_text() for name in ("canvas", "sprites", "world", "scene"))
