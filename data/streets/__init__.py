"""Procedural street scenes with exact labels, in the 19 classes of Cityscapes: pictures without a download.

world.py decides what stands where, sprites.py how things look (drawn with canvas.py), scene.py projects and lights
one frame, write.py stores scenes in the layouts of real data sets.
"""

from data.streets.scene import draw_clip, draw_scene
from data.streets.write import write_bdd100k, write_cityscapes

__all__ = ["draw_clip", "draw_scene", "write_bdd100k", "write_cityscapes"]
