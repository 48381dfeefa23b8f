"""How many street scenes a core draws in a second, at three sizes: python benchmarks/streets.py

The first scenes also draw the sprites that later ones share, so they are left out. On a busy machine the best
batch is nearer to what the core can do than the mean.
"""

import sys
import time
from pathlib import Path

import cv2

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.streets import draw_scene


def main() -> None:
    cv2.setNumThreads(1)
    print(f"{'size':>10} {'mean':>10} {'best':>10}   scenes/s")
    for size, warm, batch in (((128, 256), 200, 20), ((512, 1024), 60, 6), ((1024, 2048), 30, 3)):
        for index in range(warm):
            draw_scene(1000 + index, seed=0, size=size)
        times = []
        for start in range(0, 10 * batch, batch):
            begin = time.process_time()
            for index in range(start, start + batch):
                draw_scene(index, seed=0, size=size)
            times.append(time.process_time() - begin)
        print(f"{size[0]:>5}x{size[1]:<4} {10 * batch / sum(times):>10.1f} {batch / min(times):>10.1f}")


if __name__ == "__main__":
    main()
