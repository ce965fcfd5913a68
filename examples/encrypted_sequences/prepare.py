"""Write 260 MRI volumes as sequences of five slices, with the question: is the hippocampus a large one?

A volume is cut into five parts, and a sequence has one slice of each: at five places, which makes five sequences.

A volume's organ is large when the expert's mask has more voxels (of 1 mm^3) than the median of all. The masks serve
for nothing else, and no site gets them.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from nightsplit.site_worker.data.source import locate

FRAMES, PLACES = 5, 5


def main() -> None:
    """Write the folder `frames` with an index into this folder."""
    folder = Path(__file__).parent
    data = np.load(locate("$NIGHTSPLIT_DATA/hippocampus_msd/hippocampus_2d.npz", folder), allow_pickle=False)
    images, of_slice = data["images"], data["volume"]
    names = np.unique(of_slice)
    voxels = np.array([(data["masks"][of_slice == name] > 0).sum() for name in names])
    (folder / "frames").mkdir(exist_ok=True)
    with (folder / "frames" / "index.csv").open("w", encoding="utf-8", newline="") as file:
        index = csv.writer(file)
        index.writerow(["file", "sequence", "frame", "volume", "large"])
        for name, large in zip(names.tolist(), voxels > np.median(voxels), strict=True):
            slices = np.flatnonzero(of_slice == name)
            for number in range(FRAMES * PLACES):
                frame, place = divmod(number, PLACES)
                image = f"{name}-{number}.png"
                chosen = slices[(2 * number + 1) * len(slices) // (2 * FRAMES * PLACES)]
                Image.fromarray(images[chosen]).save(folder / "frames" / image)
                index.writerow([image, f"{name}-{place}", frame, name, int(large)])


if __name__ == "__main__":
    main()
