"""How fast a model of the published size runs, against what it is made of and what it replaces.

In one run on two threads and batches of eight windows, with seeded random weights: (a) our image
tower against transformers' ViTModel of the same size; (b) the whole image path, pixels to unit
vectors, against its own image tower, without and with metadata; (c) 8-bit weights against float32,
and what they change; (d) patch by patch codebook scoring against the image tower; (e) cells of a
map per second, `predict` at patch detail against one window, one forward pass, one cell.

    python benchmarks/sat2sound.py [--parts abcde] [--rounds 7]

All that a part compares runs in turn, round after round. A ratio is the median over the rounds;
beside it stand the least and the largest, which tell how much else the machine was doing, and the
ratio of the shortest times.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from predict import make_raster
from safetensors.torch import save_file
from torch import Tensor

from soundmap.api import Request, run
from soundmap.encoder import find_model, load_encoder
from soundmap.encoder.bank_files import PROMPTS_FILE, write_bank
from soundmap.encoder.card import CARD_FILE, file_sha256
from soundmap.encoder.memory import keep_freed_memory
from soundmap.nn.int8 import quantise
from soundmap.nn.metadata import FIELDS, Metadata, encode_hour, encode_latlong, encode_month
from soundmap.nn.model import ModelConfig, SoundModel
from soundmap.nn.vit import ViTConfig
from soundmap.sources.sample import SAMPLE_GRID, SampleSource

THREADS = 2
BATCH = 8
# Windows that a thread takes at a time, as TorchEncoder does.
PASS = 2
GSD_M = 10.0
Step = Callable[[], object]


def draw(name: str, shape: torch.Size) -> Tensor:
    """Draw a weight as the stand-in of the published checkpoint is: scaled by what it adds up."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("logit_scale"):
        return math.log(1 / 0.07) + 0.1 * noise
    if name.endswith("bias"):
        return 0.02 * noise
    if len(shape) == 1:
        return 1 + 0.02 * noise
    if name.endswith(("codes", "source.weight")):
        return noise
    return noise / math.sqrt(math.prod(shape[1:]))


def make_model(config: ModelConfig) -> SoundModel:
    with torch.device("meta"):
        model = SoundModel(config)
    weights = {name: draw(name, weight.shape) for name, weight in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def sample_windows(side: int) -> Tensor:
    """Cut windows from the sample scene: uint8[BATCH, 3, side, side]."""
    scene = torch.from_numpy(SampleSource().read(SAMPLE_GRID).pixels)
    rng = np.random.default_rng(0)
    corners = rng.integers(0, scene.shape[-1] - side, (BATCH, 2)).tolist()
    windows = torch.stack([scene[:, y : y + side, x : x + side] for y, x in corners])
    return windows.contiguous(memory_format=torch.channels_last)


def given_metadata(fields: tuple[str, ...]) -> Metadata:
    """Metadata of the windows, as a map gives it: where each is, one month, one hour."""
    places = torch.tensor([[13.9 + i / 50, 50.0] for i in range(BATCH)], dtype=torch.float64)
    known = {
        "latlong": encode_latlong(places),
        "month": encode_month(torch.full((BATCH,), 6)),
        "time": encode_hour(torch.full((BATCH,), 13)),
    }
    return Metadata({name: value for name, value in known.items() if name in fields}, {})


class Sharing:
    """Shares a batch out to threads, each of which runs the network by itself."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(THREADS, initializer=lambda: torch.set_num_threads(1))

    def __call__(self, part: Callable[[int, int], Tensor]) -> Tensor:
        def work(start: int) -> Tensor:
            with torch.inference_mode():
                return part(start, min(start + PASS, BATCH))

        return torch.cat(list(self.pool.map(work, range(0, BATCH, PASS))))


def together(part: Callable[[int, int], Tensor]) -> Tensor:
    """Run a batch as one, operators on all threads."""
    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        return part(0, BATCH)


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    value: float
    limit: float
    at_most: bool = True
    extra: str = ""

    def __str__(self) -> str:
        holds = self.value <= self.limit if self.at_most else self.value >= self.limit
        bound = f"{'at most' if self.at_most else 'at least'} {self.limit:g}"
        verdict = "holds" if holds else "MISSED"
        return f"{self.what:60}{self.value:9.4f}  {bound:14}{verdict:8}{self.extra}"


@dataclass(frozen=True)
class Times:
    """Seconds of each step in each round."""

    seconds: dict[str, list[float]]

    def best(self, name: str) -> float:
        return min(self.seconds[name])

    def line(self, what: str, over: str, under: str, limit: float, at_most: bool = True) -> Line:
        """Compare one step's time with another's."""
        rounds = zip(self.seconds[over], self.seconds[under], strict=True)
        ratios = [a / b for a, b in rounds]
        extra = f"{min(ratios):.3f} to {max(ratios):.3f}; {self.best(over) / self.best(under):.3f}"
        return Line(what, statistics.median(ratios), limit, at_most, extra)


def in_turn(steps: dict[str, Step], rounds: int) -> Times:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for i in range(rounds):
        # Every other round backwards, so that none always comes after the same.
        for name in list(steps)[:: -1 if i % 2 else 1]:
            started = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - started)
    return Times(seconds)


class Watch:
    """Adds up the time that threads spend in some functions of a module."""

    def __init__(self, module: torch.nn.Module, *names: str) -> None:
        self.module, self.names = module, names
        self._lock = threading.Lock()
        self.seconds = 0.0

    def __enter__(self) -> Watch:
        for name in self.names:
            setattr(self.module, name, self._timed(getattr(self.module, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            delattr(self.module, name)

    def _timed(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*args: object, **kwargs: object) -> Tensor:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                with self._lock:
                    self.seconds += time.perf_counter() - started

        return timed


class Bench:
    """The model without metadata and its windows, and what the parts measure with them."""

    def __init__(self, config: ModelConfig, rounds: int) -> None:
        self.config, self.rounds = config, rounds
        self.share = Sharing()
        self.model = make_model(config)
        self.windows = sample_windows(config.vit.window_px)
        self.pixels = self.model.normalise(self.windows)
        self.gsd_m = torch.tensor([GSD_M])

    def vit(self, start: int, stop: int) -> Tensor:
        tokens: Tensor = self.model.vit(self.pixels[start:stop], self.gsd_m)
        return tokens

    def image(self, model: SoundModel, metadata: Metadata | None = None) -> Callable[[], Tensor]:
        """The whole image path, pixels to unit vectors."""

        def part(start: int, stop: int) -> Tensor:
            own = metadata and metadata.part(start, stop)
            return model.encode_image(self.windows[start:stop], self.gsd_m, own)

        return lambda: self.share(part)

    def against_transformers(self) -> list[Line]:
        from transformers import ViTConfig as TheirConfig
        from transformers import ViTModel

        ours = self.config.vit
        config = TheirConfig(
            hidden_size=ours.width,
            num_hidden_layers=ours.depth,
            num_attention_heads=ours.heads,
            intermediate_size=int(ours.width * ours.mlp_ratio),
            image_size=ours.window_px,
            patch_size=ours.patch_px,
        )
        torch.manual_seed(0)
        theirs = ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)

        def part(start: int, stop: int) -> Tensor:
            tokens: Tensor = theirs(self.pixels[start:stop]).last_hidden_state
            return tokens

        def with_attention(kind: str) -> Step:
            def step() -> None:
                theirs.set_attn_implementation(kind)
                together(part)

            return step

        trial = in_turn({kind: with_attention(kind) for kind in ("sdpa", "eager")}, 3)
        kind = min(trial.seconds, key=trial.best)
        theirs.set_attn_implementation(kind)
        times = in_turn(
            {
                "ours shared": lambda: self.share(self.vit),
                "theirs shared": lambda: self.share(part),
                "ours together": lambda: together(self.vit),
                "theirs together": lambda: together(part),
            },
            self.rounds,
        )
        ways = ("shared", "together")
        ours_by, theirs_by = (
            min(ways, key=lambda way, who=who: times.best(f"{who} {way}"))
            for who in ("ours", "theirs")
        )
        what = f"a  ViT over transformers' ({kind}): {ours_by} over {theirs_by}"
        lines = [times.line(what, f"ours {ours_by}", f"theirs {theirs_by}", 1.0)]
        lines += [times.line(f"   both {w}", f"ours {w}", f"theirs {w}", 1.0) for w in ways]
        return lines

    def path(self, with_metadata: SoundModel) -> list[Line]:
        """Compare the image path with the part of its own time that the image tower takes.

        Both are seconds of the same passes: what else the machine does hits both alike.
        """
        metadata = given_metadata(with_metadata.config.metadata)
        lines = []
        for what, model, known, limit in (
            ("b  whole image path over its ViT", self.model, None, 1.25),
            ("   the same with metadata", with_metadata, metadata, 1.55),
        ):
            step = self.image(model, known)
            step()
            seconds: dict[str, list[float]] = {"whole": [], "vit": []}
            for _ in range(self.rounds):
                with Watch(model.vit, "embed", "mix") as vit, Watch(model, "encode_image") as whole:
                    step()
                seconds["vit"].append(vit.seconds)
                seconds["whole"].append(whole.seconds)
            lines.append(Times(seconds).line(what, "whole", "vit", limit))
        return lines

    def int8(self, with_metadata: SoundModel) -> list[Line]:
        metadata = given_metadata(with_metadata.config.metadata)
        coarse, coarse_with = make_model(self.config), make_model(with_metadata.config)
        quantise(coarse)
        quantise(coarse_with)
        steps = {
            "float32": self.image(self.model),
            "int8": self.image(coarse),
            "float32 with": self.image(with_metadata, metadata),
            "int8 with": self.image(coarse_with, metadata),
        }
        times = in_turn(steps, self.rounds)
        lines = [
            times.line("c  float32 over int8, whole image path", "float32", "int8", 2.0, False),
            times.line("   the same with metadata", "float32 with", "int8 with", 2.0, False),
        ]
        texts = self.text_like()
        for name in ("", " with"):
            fine, rough = (steps[kind + name]() for kind in ("float32", "int8"))
            change = float(((fine - rough) @ texts.T).abs().max())
            apart = float(1 - (fine * rough).sum(-1).min())
            suffix = ", with metadata" if name else ""
            lines.append(Line(f"   largest change of similarity to a text{suffix}", change, 0.01))
            lines.append(Line(f"   1 - cosine to the float32 embedding{suffix}", apart, 0.01))
        return lines

    def text_like(self, count: int = 200) -> Tensor:
        """Unit vectors float32[count, D] that the text side makes of random tokens."""
        rng = torch.Generator().manual_seed(1)
        tokens = torch.randn(count, 12, self.config.text_dim, generator=rng)
        with torch.inference_mode():
            return torch.cat([self.model.encode_text(part) for part in tokens.split(20)])

    def patches(self) -> list[Line]:
        with torch.inference_mode():
            queries = self.model.queries(self.model.embed(self.windows), self.gsd_m)
        each = self.model.codebook.each
        times = in_turn(
            {
                "vit": lambda: self.share(self.vit),
                "each": lambda: self.share(lambda start, stop: each(queries[start:stop])),
            },
            self.rounds,
        )
        return [times.line("d  codebook for every patch over the ViT", "each", "vit", 0.6)]

    def mapping(self, side_px: int, windows: int) -> list[Line]:
        with tempfile.TemporaryDirectory() as temporary:
            folder, raster = Path(temporary) / "model", Path(temporary) / "scene.tif"
            make_raster(raster, side_px, None)
            self.write_folder(folder)
            encoder = load_encoder(str(folder), threads=THREADS, precision="float32")
            single = self.windows.contiguous().numpy()

            def one_by_one() -> float:
                started = time.perf_counter()
                for i in range(windows):
                    encoder.encode_images(single[i % BATCH][None], details=("image",))
                return time.perf_counter() - started

            torch.set_num_threads(THREADS)
            one_by_one()
            before = one_by_one()
            started = time.perf_counter()
            out = Path(temporary) / "map.zarr"
            run(Request(out=out, imagery=str(raster), model=str(folder), precision="float32"))
            wall = time.perf_counter() - started
            after = one_by_one()
        cells = (side_px // self.config.vit.patch_px) ** 2
        value = (cells / wall) / (2 * windows / (before + after))
        extra = (
            f"{cells} cells in {wall:.1f} s, loading the model and all; "
            f"{windows} windows before in {before:.1f} s, after in {after:.1f} s"
        )
        return [Line("e  cells/s of predict over one window, one cell", value, 60, False, extra)]

    def write_folder(self, folder: Path) -> None:
        """Write the model as `soundmap predict` takes it, with a bank of random concepts."""
        folder.mkdir()
        weights = folder / "model.safetensors"
        state = {k: v.contiguous() for k, v in self.model.state_dict().items()}
        save_file(state, str(weights))
        vit = self.config.vit
        card = {
            "name": "benchmark",
            "summary": "random weights of the published size",
            "licence": "none",
            "architecture": asdict(self.config),
            "input": {
                "window_px": vit.window_px,
                "patch_px": vit.patch_px,
                "native_px": vit.window_px,
                "gsd_m": [[GSD_M, GSD_M]],
            },
            "text": {"encoder": "none"},
            "files": {weights.name: file_sha256(weights)},
        }
        (folder / CARD_FILE).write_text(json.dumps(card))
        names = [f"sound {i}" for i in range(48)]
        (folder / PROMPTS_FILE).write_text(json.dumps([{"name": name} for name in names]))
        none = np.full(len(names), np.nan, np.float32)
        arrays = {
            "vectors": self.text_like(len(names)).numpy(),
            "share_scale": np.array([14.0], np.float32),
            "patch.scale": none,
            "patch.bias": none,
        }
        write_bank(folder, find_model(str(folder)).hash, arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="abcde", help="which of them to measure")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", type=int, default=2048, help="px of the raster that is mapped")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args()
    config = ModelConfig()
    if args.tiny:
        vit = ViTConfig(width=48, depth=2, heads=2)
        config = ModelConfig(vit, token_dim=64, dim=64, codes=500, text_dim=64)
    torch.set_num_threads(THREADS)
    keep_freed_memory()  # as every encoder on a processor does
    bench = Bench(config, args.rounds)
    with_metadata = (
        make_model(replace(config, metadata=FIELDS)) if {*"bc"} & {*args.parts} else None
    )
    measure: dict[str, Callable[[], list[Line]]] = {
        "a": bench.against_transformers,
        "b": lambda: bench.path(with_metadata),
        "c": lambda: bench.int8(with_metadata),
        "d": bench.patches,
        "e": lambda: bench.mapping(args.side, 8),
    }
    print(f"{THREADS} threads, batches of {BATCH} windows, {args.rounds} rounds")
    for name in args.parts:
        for line in measure[name]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
