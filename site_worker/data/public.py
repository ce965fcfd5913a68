"""Sources of the public data sets of the examples, which are not part of the project."""

from pathlib import PurePath

_ORIGINS = {
    "covid_ct": (
        "COVID-CT from https://github.com/UCSD-AI4H/COVID-CT",
        "the images and an index.csv with the columns file, label_covid (0 or 1) and group (the patient)",
    ),
    "pneumoniamnist": ("PneumoniaMNIST from https://medmnist.com", "the file pneumoniamnist.npz"),
    "heart_uci": (
        "Heart Disease from https://archive.ics.uci.edu/dataset/45/heart+disease",
        "cleveland.csv, hungarian.csv, switzerland.csv, va.csv, with a heading, and empty cells for '?'",
    ),
    "hippocampus_msd": (
        "Task04_Hippocampus from http://medicaldecathlon.com",
        "the file hippocampus_2d.npz: its slices, padded to 64x64, as the uint8 arrays images, masks and volume",
    ),
    "mednist64": (
        "MedNIST from https://github.com/Project-MONAI/MONAI-extra-test-data",
        "the file mednist64.npz: images of 64x64 and labels 0 to 5, as the arrays images and labels",
    ),
    "mura": (
        "MURA from https://stanfordmlgroup.github.io/competitions/mura (needs an agreement with Stanford)",
        "its folders train/XR_WRIST/patient00006/study1_positive and so on, unchanged",
    ),
}


def download_hint(path: str) -> str | None:
    """Return instructions to download a data set of the examples, if a folder in `path` has its name."""
    for part in PurePath(path).parts:
        name = part.lower().removesuffix("-v1.1")
        if name in _ORIGINS:
            origin, content = _ORIGINS[name]
            return f"download {origin}; the folder {part!r} must hold {content}"
    return None
